"""Samples and scores a data set as a run's own evaluation does, and keeps each prompt's rewards."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import TextIO

from tqdm import tqdm

from openrlhf_apo.data.inputs import make_tokenizer, read_inputs
from openrlhf_apo.embedded.engine import EmbeddedEngine
from openrlhf_apo.embedded.launch import load_model
from openrlhf_apo.embedded.reward_model import load_reward_model
from openrlhf_apo.trainer.agents import AgentEngine
from openrlhf_apo.trainer.evaluation import Evaluation
from openrlhf_apo.trainer.handles import SamplingSettings
from openrlhf_apo.trainer.plan import RunPlan
from openrlhf_apo.trainer.samples import Sample, whole_groups


def evaluate(
    plan: RunPlan, args: SimpleNamespace, samples: int | None, temperature: float | None, console: TextIO
) -> tuple[list[list[Sample]], list[list[Sample]]]:
    """The scored greedy answer of each of the plan's prompts, in a group of one; and groups of `samples` answers at
    `temperature`, none where both are None.

    args: OpenRLHF's settings. console: for the progress bars. Raises DataError or OptionError for what cannot be
    used, RunError for answers that cannot be scored.
    """
    tokenizer = make_tokenizer(args)
    rate = load_reward_model(args, plan.micro_batches).rate if plan.reward.model else None
    inputs = read_inputs(plan, args, tokenizer, rate)
    assert inputs.prompts is not None
    rows = inputs.prompts.rows
    sampler = EmbeddedEngine(load_model(args), tokenizer)
    engine = AgentEngine.of(sampler, tokenizer, inputs.scorer.reward)

    def groups(settings: SamplingSettings, title: str) -> list[list[Sample]]:
        batches = -(-len(rows) // max(1, sampler.batch // settings.samples_per_prompt))
        longest = settings.max_new_tokens or settings.max_len
        total = batches * longest if engine is sampler else None  # who knows how many turns there will be?
        with tqdm(total=total, desc=title, unit="token", file=console) as bar:
            hook = sampler.model.register_forward_hook(_advances(bar))
            answers = engine.generate(Evaluation(rows, settings, None, False).prompts, settings)
            hook.remove()
            bar.update((bar.total or bar.n) - bar.n)  # the answers may have ended before
        return whole_groups(inputs.scorer.score(answers), settings.samples_per_prompt)

    greedy = groups(replace(plan.sampling, samples_per_prompt=1, temperature=0.0), "greedy")
    if samples is None or temperature is None:
        return greedy, []
    sampling = replace(plan.sampling, samples_per_prompt=samples, temperature=temperature)
    return greedy, groups(sampling, f"{samples} samples")


def _advances(bar: tqdm) -> Callable[..., None]:
    """A hook: each forward is a token of every answer of a batch. It returns None, or what it returns would be taken
    for the model's output."""

    def hook(*_) -> None:
        bar.update()

    return hook
