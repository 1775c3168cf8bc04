"""README.md beside a trained model: what it is, what became of it, how to load it and how to train it again."""

import logging
import os
from pathlib import Path

from openrlhf_apo.settings import settings_of
from openrlhf_apo.trainer.files import write_whole
from openrlhf_apo.trainer.group_objective import GroupPlan
from openrlhf_apo.trainer.handles import EMA_FOLDER
from openrlhf_apo.trainer.hidden import hide_in_addresses
from openrlhf_apo.trainer.plan import RewardPart, RunPlan
from openrlhf_apo.trainer.run_record import versions
from openrlhf_apo.trainer.summary import gains

logger = logging.getLogger(__name__)

OURS = "<!-- Written by openrlhf_apo. A later run replaces this file, unless this line is removed. -->"


def write_model_card(plan: RunPlan, rows: list[dict]) -> None:
    """Into --ckpt.output_dir. rows: of metrics.jsonl. A README.md of someone else's stays."""
    path = Path(plan.output.directory) / "README.md"
    if path.exists() and OURS not in path.read_text(encoding="utf-8", errors="replace"):
        logger.info("%s was not written by a run: it is left as it is, without the model's card", path)
        return
    write_whole(path, hide_in_addresses(_card(plan, rows)))


def _card(plan: RunPlan, rows: list[dict]) -> str:
    settings = plan.record["settings"]
    base, schedule = settings["actor.model_name_or_path"], plan.schedule
    given = " ".join(f"`--{flag} {_words(value)}`" for flag, value in plan.record["given_to_the_loss"].items())
    sizes = f"{schedule.prompts_per_rollout} prompts x {schedule.group_size} answers, seed {schedule.seed}"
    table = {
        "base model": f"`{base}`",
        "data": f"`{plan.saved_rollouts or plan.data.prompts}`",
        "reward": _reward(plan),
        "adapter": _adapter(settings),
        "loss": f"`{plan.loss}`, {given or 'all its settings are the defaults'}",
        "α": _alpha(plan, rows),
        "moving average": f"`{EMA_FOLDER}/`, of every step's weights, β {plan.ema}" if plan.ema is not None else "",
        "rollouts": f"{rows[-1]['step'] if rows else 0} of {sizes}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    lines = [
        "---",
        "library_name: transformers",
        *([] if os.path.isdir(base) else [f"base_model: {base}"]),  # a hub's name, which the hub links
        "tags: [reinforcement-learning, openrlhf_apo]",
        "---",
        *(OURS, "", f"# {Path(plan.output.directory).name}", "", "| | |", "| --- | --- |"),
        *(f"| {name} | {text} |" for name, text in table.items() if text),
        *("", *(f"- {line}" for line in gains(rows))),
        *("", "Every rollout is in `metrics.jsonl`, every setting in `run.json`. To load it:", "", "```python"),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'folder = "{plan.output.directory}"',
        f"model = AutoModelForCausalLM.from_pretrained(folder{_trust(settings)})",
        f"tokenizer = AutoTokenizer.from_pretrained(folder{_trust(settings)})",
        *("```", "", "It was trained by", "", "```bash", plan.record["command"], "```", ""),
    ]
    return "\n".join(lines)


def _adapter(settings: dict) -> str:
    """Empty where all weights trained."""
    if not settings["ds.lora.rank"]:
        return ""
    where = _words(settings["ds.lora.target_modules"])
    packed = " of a base in 4 bits" if settings["ds.load_in_4bit"] else ""
    return f"LoRA of rank {settings['ds.lora.rank']}, alpha {settings['ds.lora.alpha']}, on {where}{packed}"


def _reward(plan: RunPlan) -> str:
    if plan.saved_rollouts:
        return "of the saved rollouts"
    parts = plan.reward.parts
    return " + ".join(f"{part.weight:g} x {_part(part)}" if len(parts) > 1 else _part(part) for part in parts)


def _part(part: RewardPart) -> str:
    if part.function is not None:
        return f"the Python function `{part.function.__qualname__}`"
    if part.model is not None:
        return f"the reward model `{part.model}`"
    if part.agent is not None:
        return f"the agent `{part.agent}`"
    return f"`{' '.join(part.urls or ['math_verify'])}`"


def _alpha(plan: RunPlan, rows: list[dict]) -> str:
    """The controller with its settings, and where it went; empty for a loss that has none."""
    if not isinstance(plan.objective, GroupPlan) or plan.objective.controller is None:
        return ""
    controller = plan.objective.controller
    kind: type = type(controller)
    values = ", ".join(f"{each.name} {getattr(controller, each.name)}" for each in settings_of(kind))
    alphas = [row["alpha"] for row in rows if "alpha" in row]
    went = f"; from {alphas[0]:.3f} to {alphas[-1]:.3f}" if alphas else ""
    return f"`{plan.record['settings']['alpha_mode']}` ({values}){went}"


def _words(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _trust(settings: dict) -> str:
    return ", trust_remote_code=True" if settings["actor.trust_remote_code"] else ""
