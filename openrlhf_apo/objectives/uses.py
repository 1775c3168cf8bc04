"""What a loss must declare (`uses=`) before it can read it. Every other field is there for all losses."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Use:
    """field: of the context or of the step. unread: what is wrong where a loss declares it and does not read it."""

    field: str
    unread: str


# Of GroupContext, for group losses.
GROUP_USES = {
    "target": Use("log_q", "--apo.beta_r would have no effect"),
    "alpha": Use("alpha", "--alpha_mode would be logged to no effect"),
    "weight_clip": Use("weight_clip", "--apo.weight_clip would have no effect"),
}
# Of TokenStep, for token losses.
TOKEN_USES = {
    "entropy": Use("entropies", "it costs a forward in every rollout"),
    "max_length": Use("max_length", "--rollout.max_new_tokens would be asked for in vain"),
}


def use_of(field: str, uses: dict[str, Use]) -> str | None:
    """The word that declares a field; None for one that needs no declaration."""
    return next((name for name, use in uses.items() if use.field == field), None)
