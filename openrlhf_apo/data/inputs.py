"""What a run reads before anything is started: its reward, prompts, and held-out prompts."""

from types import SimpleNamespace

from openrlhf_apo.data.prompt_rows import load_prompts
from openrlhf_apo.errors import OptionError
from openrlhf_apo.rewards.function import FunctionReward
from openrlhf_apo.rewards.isolated import IsolatedReward
from openrlhf_apo.rewards.verifier import MathVerifyReward
from openrlhf_apo.trainer.assemble import Inputs
from openrlhf_apo.trainer.plan import RunPlan
from openrlhf_apo.trainer.scoring import Scorer


def read_inputs(plan: RunPlan, args: SimpleNamespace, tokenizer) -> Inputs:
    """args: OpenRLHF's settings, for its reader. Raises DataError or OptionError, naming the fix."""
    if plan.reward.function is not None:
        reward = FunctionReward(plan.reward.function)
    elif plan.reward.urls is None:
        reward = MathVerifyReward(plan.reward.timeout)
    elif plan.reward.isolate:
        reward = IsolatedReward(plan.reward.urls[0], plan.reward.timeout)
    else:
        from openrlhf_apo.rewards.remote import RemoteReward  # imports aiohttp and OpenRLHF

        reward = RemoteReward(plan.reward.urls, plan.reward.timeout)
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
