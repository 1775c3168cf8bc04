"""From resolved settings to the objects that they describe. ValueError, naming the field, for a bad value."""

from types import SimpleNamespace

from openrlhf_apo.alpha import build_alpha_controller
from openrlhf_apo.alpha.controller import AlphaController
from openrlhf_apo.objectives import (
    GROUP_LOSSES,
    TOKEN_LOSSES,
    Adrpo,
    AlphaDivergenceLoss,
    GroupTargetBuilder,
    Guidance,
    TokenLoss,
)
from openrlhf_apo.options import flags


def alpha_controller(args: SimpleNamespace) -> AlphaController | None:
    """None for a loss without alpha."""
    apo, mode = args.apo, args.alpha_mode
    if args.loss not in GROUP_LOSSES or args.loss in flags.WITHOUT_ALPHA:
        return None
    if mode == "fixed":
        return build_alpha_controller(mode, alpha=apo.alpha)
    bounds = {"alpha_max": apo.alpha_max, "alpha_min": apo.alpha_min, "rho": apo.rho}
    if mode == "ess":
        return build_alpha_controller(mode, **bounds, gamma=apo.gamma, weights=apo.ess_weights, scope=apo.ess_scope)
    return build_alpha_controller(
        mode,
        **bounds,
        lam=apo.lam,
        reward_scale=apo.reward_scale,
        reward_scale_mode=apo.reward_scale_mode,
        baseline_init=apo.baseline_init,
    )


def weight_clip(args: SimpleNamespace) -> tuple[float, float] | None:
    return tuple(args.apo.weight_clip) if args.apo.weight_clip else None


def token_loss(args: SimpleNamespace) -> TokenLoss:
    loss = TOKEN_LOSSES[args.loss]
    settings: dict = {}
    if args.loss in flags.EPS_CLIP:
        settings["eps_low"], settings["eps_high"] = args.actor.eps_clip_low_high
    if args.loss in flags.DUAL_CLIP:
        settings["dual_clip"] = args.actor.dual_clip
    if args.loss == "bapo":
        low, high = tuple(args.bapo.low_range), tuple(args.bapo.high_range)
        settings |= {"rho": args.bapo.rho, "low_range": low, "high_range": high, "step": args.bapo.step}
    if args.loss == "gtpo":
        settings |= {"gamma": args.gtpo.gamma, "conflict_weight": args.gtpo.conflict_weight}
    if args.loss == "alpha_ppo":
        settings |= {"alpha": args.alpha_ppo.alpha, "beta": args.alpha_ppo.beta}
    return loss(**settings)


def guidance(args: SimpleNamespace) -> Guidance | None:
    return Guidance(args.g2rpo_a.share, args.g2rpo_a.length) if args.loss == "g2rpo_a" else None


def adrpo(args: SimpleNamespace) -> Adrpo | None:
    return Adrpo(args.adrpo.beta_0, args.adrpo.beta_min, args.adrpo.beta_max) if args.adrpo.enable else None


def build_all(args: SimpleNamespace) -> None:
    """Raise ValueError for the first setting that its object refuses."""
    adrpo(args)
    guidance(args)
    if args.loss in GROUP_LOSSES:
        alpha_controller(args)
        GroupTargetBuilder(args.apo.beta_r)
        AlphaDivergenceLoss(args.apo.tau_anc, weight_clip(args))
    elif args.loss in TOKEN_LOSSES:
        token_loss(args)
