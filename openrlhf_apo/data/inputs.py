"""What a run reads before anything is started: its reward, prompts, and held-out prompts."""

from types import SimpleNamespace

from openrlhf_apo.data.prompt_rows import load_prompts
from openrlhf_apo.errors import OptionError, RewardFailure
from openrlhf_apo.rewards.function import FunctionReward
from openrlhf_apo.rewards.isolated import IsolatedReward
from openrlhf_apo.rewards.model import ModelReward, Rate
from openrlhf_apo.rewards.reward import Answer, RewardFunction
from openrlhf_apo.rewards.verifier import MathVerifyReward
from openrlhf_apo.rewards.weighted import WeightedReward
from openrlhf_apo.trainer.agents import AgentReward
from openrlhf_apo.trainer.assemble import Inputs
from openrlhf_apo.trainer.plan import RewardPart, RewardPlan, RunPlan
from openrlhf_apo.trainer.prompts import PromptRow
from openrlhf_apo.trainer.scoring import Scorer


def read_inputs(plan: RunPlan, args: SimpleNamespace, tokenizer, rate: Rate | None = None) -> Inputs:
    """args: OpenRLHF's settings, for its reader. rate: of the plan's reward model, where it has one. Raises DataError
    or OptionError, naming the fix."""
    if plan.reward.model is not None:
        _check_reward_tokenizer(plan.reward.model, args.actor.trust_remote_code, tokenizer)
    reward = _reward(plan.reward, rate)
    common = {
        "seed": plan.schedule.seed,
        "label_key": plan.data.label_key,
        "label_optional": plan.data.label_optional,
        "check_label": reward.check_label,
    }
    rows = held_out = None
    if plan.data.prompts is not None and args.data.apply_chat_template and not tokenizer.chat_template:
        raise OptionError(
            "the model's tokenizer has no chat template: leave --data.apply_chat_template out, and use the prompts as "
            "they are, or give a text with {} for them by --data.input_template"
        )
    if plan.data.prompts is not None:
        rows = load_prompts(
            args,
            tokenizer,
            plan.data.prompts,
            probabilities=plan.data.probabilities,
            split=plan.data.split,
            solution_key=plan.guidance.solution_key if plan.guidance else None,
            prompt_limit=plan.sampling.prompt_limit,
            **common,
        )
        if plan.reward.max_failures == 0:
            _try_reward_files(plan.reward, reward, rows[0])
    if plan.evaluation is not None:
        held_out = load_prompts(
            args,
            tokenizer,
            plan.data.evaluation,
            split=plan.data.evaluation_split,
            prompt_limit=plan.evaluation.sampling.prompt_limit,
            **common,
        )
    return Inputs(plan, rows, held_out, Scorer(reward, plan.reward.max_failures))


def _try_reward_files(plan: RewardPlan, reward: RewardFunction, row: PromptRow) -> None:
    """Call each file once, with a row's prompt and its label as the answer: what fails there would end the run at its
    first rollout."""
    response = str(row.label)  # such as an answer may be
    functions = [part for part, _ in reward.parts.values()] if isinstance(reward, WeightedReward) else [reward]
    for part, function in zip(plan.parts, functions, strict=True):
        if part.urls is None or not part.is_file:
            continue
        (found,) = function([Answer(row.text, response, row.label)], 0)
        if isinstance(found, RewardFailure):
            raise OptionError(
                f"the reward {part.urls[0]}: for the first row the reward {found} (prompt {row.text[-80:]!r}, "
                f"response {response!r}, label {row.label!r})"
            )


def _reward(plan: RewardPlan, rate: Rate | None) -> RewardFunction:
    parts = {part.name: (_reward_part(part, plan.isolate, rate), part.weight) for part in plan.parts}
    if len(parts) == 1:
        return next(iter(parts.values()))[0]
    return WeightedReward(parts)


def _reward_part(part: RewardPart, isolate: bool, rate: Rate | None) -> RewardFunction:
    if part.model is not None:
        assert rate is not None
        return ModelReward(rate)
    if part.agent is not None:
        from openrlhf_apo.rewards.agent_file import load_agent  # imports aiohttp and OpenRLHF

        return AgentReward(load_agent(part.agent), part.timeout)
    if part.function is not None:
        return FunctionReward(part.function)
    if part.urls is None:
        return MathVerifyReward(part.timeout)
    if isolate and part.is_file:
        return IsolatedReward(part.urls[0], part.timeout)
    from openrlhf_apo.rewards.remote import RemoteReward  # imports aiohttp and OpenRLHF

    return RemoteReward(part.urls, part.timeout)


def _check_reward_tokenizer(path: str, trust_remote_code: bool, tokenizer) -> None:
    """A reward model reads the policy's tokens as they are, so both need one tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    vocabulary = tokenizer.get_vocab()
    try:
        other = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        same = len(other) <= len(other.all_special_tokens) or other.get_vocab() == vocabulary
    except (OSError, ValueError):  # saved without one, of which transformers at times makes an empty one
        same = True
    if not same or config.vocab_size <= max(vocabulary.values()):
        raise OptionError(
            f"--reward.model_name_or_path {path} has another tokenizer than the policy, whose tokens it would read: "
            "use a reward model of the same family, or put it behind a server (--reward http://...)"
        )


def make_tokenizer(args: SimpleNamespace):
    """That of the model. args: OpenRLHF's settings. Raises OptionError for a model without one."""
    from transformers import AutoTokenizer

    path = args.actor.model_name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, trust_remote_code=args.actor.trust_remote_code, use_fast=not args.data.disable_fast_tokenizer
        )
    except (OSError, ValueError) as error:
        raise OptionError(
            f"--actor.model_name_or_path {path} has no tokenizer that can be read: {str(error).splitlines()[0]}"
        ) from None
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes of a folder without one
        raise OptionError(f"--actor.model_name_or_path {path} has no tokenizer: copy its tokenizer files there")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
