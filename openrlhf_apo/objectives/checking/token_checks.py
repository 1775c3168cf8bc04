"""What a token loss does on random answers.

Errors are wrong columns, shapes or dtypes, no gradient, values that are not finite on ordinary inputs, a state that
does not survive a checkpoint, and a gradient that depends on padding, on which answers share a micro-batch, or on the
order of a group's answers.
"""

import json
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from openrlhf_apo.errors import LossError, in_one_line
from openrlhf_apo.objectives.registry import TOKEN_LOSSES
from openrlhf_apo.objectives.terms import Terms
from openrlhf_apo.objectives.uses import TOKEN_USES

from . import findings
from .examined import Examined
from .findings import differ
from .random_answers import LONGEST, random_answers
from .random_groups import Rewards

SHAPES = ((3, 2), (2, 3), (4, 8))  # (G, P); different, so that a mix-up of the two shows
REWARDS: tuple[Rewards, ...] = ("equal", "binary", "graded")
VARIED: tuple[Rewards, ...] = ("binary", "graded")
EXTREMES: dict[str, dict[str, Any]] = {
    "log-ratios of ±50 nats": {"log_ratio": "large"},
    f"lengths of 1 and {LONGEST:,}": {"lengths": "extreme"},
}


def _varied(name: str, shape: tuple[int, int], **choice: Any) -> list[Tensor]:
    """The gradients [tokens] on binary and on graded rewards."""
    return [Examined(name).gradient(random_answers(shape, rewards, **choice))[1] for rewards in VARIED]


def check_terms(name: str) -> str:
    for shape in SHAPES:
        for rewards in REWARDS:
            for log_ratio in ("zero", "moderate"):
                terms = Examined(name).terms(random_answers(shape, rewards, log_ratio))
    return "advantage and weight, [N] float64" + (", a weight per token" if terms.token_weights is not None else "")


def check_per_token(name: str) -> str:
    some = False
    for shape in SHAPES:
        for rewards in REWARDS:
            for log_ratio in ("zero", "moderate"):
                for dtype in (torch.float32, torch.float64):
                    answers = random_answers(shape, rewards, log_ratio)
                    some |= bool(Examined(name).gradient(answers, dtype=dtype)[1].any())
    if not some:
        raise LossError(f"token loss {name!r} has gradient zero everywhere: is log_probs detached?")
    return "(loss, clipped), [B, T], in the dtype of log_probs"


def check_advantages(name: str) -> str:
    examined, answers, length = Examined(name), random_answers((4, 4), "graded"), 3
    terms = examined.terms(answers)
    long = [i for i, tokens in enumerate(answers.lengths) if tokens >= length]
    new, old = (torch.stack([rows[i][:length] for i in long]) for rows in (answers.new, answers.old))
    advantages, mask = terms.take(long).column("advantage", new), torch.ones_like(new)
    one, other = (
        examined.per_token(terms.loss, new, old, given, mask) for given in (advantages, advantages.repeat(1, length))
    )
    if differ(one, other):
        raise LossError(
            f"token loss {name!r} takes advantages of [B, T] for others than the same ones of [B, 1]: "
            "with KL in the reward they are one per token"
        )
    return "one per answer, or with KL in the reward one per token"


def check_finite(name: str) -> str:
    for what, choice in EXTREMES.items():
        for rewards in REWARDS:
            try:
                Examined(name).gradient(random_answers((4, 4), rewards, **choice), dtype=torch.float32)
            except LossError as error:
                return f"yes, but training would stop at {what}: {error}"
    return f"value and gradient, also with {', '.join(EXTREMES)}"


def check_repeatable(name: str) -> str:
    if any(map(differ, _varied(name, (4, 4)), _varied(name, (4, 4)))):
        raise LossError(f"token loss {name!r} gives different gradients for the same inputs: is it random?")
    return "the same inputs give the same gradient"


def check_padding(name: str) -> str:
    for rewards in VARIED:
        answers = random_answers((2, 4), rewards)
        bare = Examined(name).gradient(answers)[1]
        for layout in ({"before": 3, "after": 5}, {"before": 3, "after": 5, "outside": (-0.3, -0.7)}):
            if differ(bare, Examined(name).gradient(answers, **layout)[1]):
                raise LossError(
                    f"token loss {name!r} depends on what stands outside the answers: multiply by mask before any sum "
                    "or mean over tokens, and divide by mask.sum(-1, keepdim=True)"
                )
    return "what stands outside the answers changes nothing"


def check_micro_batches(name: str) -> str:
    layouts = {
        "one": [[i] for i in range(8)],
        "two": [[0, 5], [7, 2], [1, 3], [4, 6]],
        "three": [[6, 1, 4], [0, 2, 3], [5, 7]],
    }
    for rewards in VARIED:
        answers = random_answers((2, 4), rewards)
        together = Examined(name).gradient(answers)[1]
        for size, layout in layouts.items():
            if differ(together, Examined(name).gradient(answers, micro_batches=layout)[1]):
                raise LossError(
                    f"token loss {name!r} depends on which answers share a micro-batch, {size} or all 8: per_token "
                    "may look at its own row only; what concerns more than one answer belongs in terms"
                )
    return "any micro-batches give the same gradient"


def check_permutation(name: str) -> str:
    order = [4, 2, 0, 5, 1, 3]
    for rewards in VARIED:
        answers = random_answers((3, 6), rewards)
        first = Examined(name).gradient(answers)[1].split(answers.lengths)
        first = torch.cat([first[start + i] for start in (0, 6, 12) for i in order])
        if differ(first, Examined(name).gradient(answers.reordered(order))[1]):
            raise LossError(f"token loss {name!r} depends on the order of a group's answers")
    return "reordering the answers of a group reorders the gradient"


def check_gradient(name: str) -> str:
    h, errors, size = 1e-4, [], 0.0
    for rewards in VARIED:
        examined, answers = Examined(name), random_answers((2, 3), rewards)
        terms = examined.terms(answers)  # the driver's, which are constants of the step
        gradient = examined.gradient(answers, terms)[1]
        size = max(size, gradient.abs().max().item())
        new = torch.cat(answers.new)
        for t, step in enumerate(h * torch.eye(len(new), dtype=torch.float64)):
            up, down = (
                examined.value(terms, list((new + sign * step).split(answers.lengths)), answers.old).item()
                for sign in (1, -1)
            )
            errors.append(abs((up - down) / (2 * h) - gradient[t].item()))
    if max(errors) > 1e-4 * size:
        return f"the gradient is not that of the value, |difference| up to {max(errors):.2g}: right only if meant"
    return "that of the value, by finite differences"


def check_equal_rewards(name: str, log_ratio: Literal["zero", "moderate"]) -> str:
    worst = Examined(name).gradient(random_answers((4, 4), "equal", log_ratio))[1].abs().max().item()
    if worst <= 1e-9 * max(gradient.abs().max().item() for gradient in _varied(name, (4, 4))):
        return "zero"
    return f"not zero: |gradient| up to {worst:.2g}: groups of equal rewards will be trained on"


def check_direction(name: str) -> str:
    rise = []
    for rewards in VARIED:
        answers = random_answers((8, 8), rewards, "zero")
        gradient = Examined(name).gradient(answers)[1].split(answers.lengths)
        of_answers = torch.stack([row.sum() for row in gradient]).view_as(answers.rewards)  # [G, P]
        better = answers.rewards - answers.rewards.mean(-1, keepdim=True)
        rise.append(-(of_answers * better).sum(-1))
    return findings.direction(torch.cat(rise), "at ratio 1")


def check_scale(name: str) -> str:
    own, grpo = (torch.cat(_varied(loss, (8, 8), log_ratio="zero")).abs().mean().item() for loss in (name, "grpo"))
    return findings.scale(own / grpo, "gradient", "at ratio 1", "grpo")


def check_state(name: str) -> str:
    before, after = (random_answers((4, 4), "graded", seed=seed) for seed in (1, 2))
    examined = Examined(name)
    examined.terms(before)
    state = examined.call(examined.loss.state_dict)
    try:
        saved = json.dumps(state, allow_nan=False, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise examined.error(f"has a state_dict that JSON cannot hold: {in_one_line(error)}") from None
    resumed = Examined(name)
    resumed.call(resumed.loss.load_state_dict, json.loads(saved))
    restored = json.dumps(resumed.call(resumed.loss.state_dict), sort_keys=True)
    if restored != saved:
        raise examined.error(
            f"does not restore its state: {saved} was saved, and after load_state_dict it is {restored}"
        )
    if differ(examined.gradient(after)[1], resumed.gradient(after)[1]):
        raise examined.error("goes on differently from a checkpoint: state_dict must hold all that terms remembers")
    return f"{', '.join(state)}: survives a checkpoint" if state else "none"


def check_uses(name: str) -> str:
    loss, read = TOKEN_LOSSES[name], set()
    for rewards in REWARDS:
        for log_ratio in ("zero", "moderate"):
            examined = Examined(name)
            examined.terms(random_answers((4, 4), rewards, log_ratio))
            read |= examined.read
    if loss.presets(LONGEST) != loss.presets(None):
        read.add("max_length")
    return findings.unread_uses(loss, TOKEN_USES, read, "step")


def check_travel(name: str, travel: Callable[[Terms], Terms]) -> str:
    """travel: gives the terms that arrive at a rank; whatever it raises is the loss's fault."""
    examined, answers = Examined(name), random_answers((2, 4), "graded")
    terms = examined.terms(answers)
    try:
        arrived = travel(terms)
    except Exception as error:
        raise examined.error(f"cannot be sent to the ranks: {in_one_line(error)}") from None
    if differ(examined.gradient(answers, terms)[1], examined.gradient(answers, arrived)[1]):
        raise examined.error("gives another gradient once it is sent to the ranks")
    return "the loss can be sent to them"


CHECKS: dict[str, Callable[[str], str]] = {
    "settings": lambda name: findings.check_settings("token", TOKEN_LOSSES[name]),
    "terms": check_terms,
    "per_token": check_per_token,
    "finite": check_finite,
    "repeatable": check_repeatable,
    "advantages": check_advantages,
    "padding": check_padding,
    "micro-batches": check_micro_batches,
    "permutation": check_permutation,
    "state": check_state,
    "gradient": check_gradient,
    "equal rewards, ratio 1": lambda name: check_equal_rewards(name, "zero"),
    "equal rewards, off it": lambda name: check_equal_rewards(name, "moderate"),
    "better answers": check_direction,
    "scale": check_scale,
    "uses": check_uses,
}
