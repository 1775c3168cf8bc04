"""The flags this project adds, and which of all flags have an effect when."""

import argparse

GROUP_LOSSES = ("apo",)
# Token objectives are OpenRLHF's own; each is what these of its flags select.
TOKEN_LOSSES = {
    "grpo": {"algo.advantage.estimator": "group_norm"},
    # GSPO's ratio is length-normalised: OpenRLHF's default clip of 0.2 would never bind (arXiv 2507.18071, §5.1).
    "gspo": {
        "algo.advantage.estimator": "group_norm",
        "actor.policy_loss_type": "gspo",
        "actor.eps_clip_low_high": (3e-4, 4e-4),
    },
}
ALPHA_MODES = ("fixed", "guarded", "ess")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE.yaml", help="set any flag from a file; the command line wins")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved settings and stop")
    parser.add_argument("--loss", choices=[*GROUP_LOSSES, *TOKEN_LOSSES], default="apo", help="the objective")
    parser.add_argument("--alpha_mode", choices=ALPHA_MODES, default="guarded", help="how alpha is chosen")

    apo = parser.add_argument_group("apo", "arXiv 2512.22953; defaults are the paper's unless said otherwise")
    add = apo.add_argument
    add("--apo.tau_anc", type=float, default=0.8, help="temperature of the anchored log-ratios (Eq. 2)")
    add("--apo.beta_r", type=float, default=1.0, help="temperature of the Boltzmann target (Eq. 5)")
    add("--apo.weight_clip", type=float, nargs=2, metavar=("MIN", "MAX"), help="clip r^alpha, gradient-level (Eq. 24)")
    add("--apo.alpha", type=float, default=0.6, help="fixed: alpha")
    add("--apo.alpha_max", type=float, default=0.9, help="guarded, ess: upper bound and start")
    add("--apo.alpha_min", type=float, default=0.35, help="guarded, ess: lower bound")
    add("--apo.rho", type=float, default=0.1, help="guarded, ess: EMA rate of alpha (Eq. 23); 1 is no smoothing")
    add("--apo.lam", type=float, default=0.1, help="guarded: EMA rate of the reward baseline (Eq. 20)")
    add("--apo.reward_scale", type=float, default=0.5, help="guarded: scale s_R of an improvement")
    add("--apo.reward_scale_mode", choices=["running", "fixed"], default="running", help="guarded: of s_R")
    add("--apo.baseline_init", choices=["first", "paper"], default="first", help="guarded: b_0 = first reward, or 0")
    add(
        "--apo.confidence",
        choices=["candidate", "relative", "token"],
        default="candidate",
        help="guarded: 1 - H(p)/log P (Eq. 19); over the target's own; or 1 - token entropy / log V",
    )
    add("--apo.gamma", type=float, default=0.5, help="ess: target ESS / P (Eq. 21)")
    add("--apo.ess_weights", choices=["ratio", "geometric"], default="ratio", help="ess: (q/p)^a, or q^a p^(1-a)")
    add("--apo.ess_scope", choices=["batch", "group"], default="batch", help="ess: one alpha, or one per group")
    add(
        "--apo.anchor",
        choices=["rollout", "lagged", "ema", "reference"],
        default="rollout",
        help="what log-ratios compare with",
    )
    add("--apo.anchor_interval", type=int, default=4, help="lagged: rollouts between refreshes")
    add("--apo.anchor_beta", type=float, default=0.99, help="ema: share of the old anchor kept per optimizer step")
    add(
        "--apo.logprob_reduction",
        choices=["sum", "mean", "const"],
        default="sum",
        help="log-prob of a sample: sum over tokens, per token, or over --apo.logprob_const",
    )
    add("--apo.logprob_const", type=float, default=1024.0, help="const: the divisor, tokens")
    add("--apo.drop_zero_variance", action="store_true", help="no gradient from groups of equal rewards")

    run = parser.add_argument_group("run", "for every loss")
    run.add_argument("--apo.save_rollouts", metavar="DIR", help="write every rollout's scored samples")
    run.add_argument("--apo.load_rollouts", metavar="DIR", help="train from saved rollouts, without an engine")
    run.add_argument("--apo.timeout", type=float, default=3600.0, help="seconds any one wait may take")
    run.add_argument("--reward", dest="reward.name", choices=["math_verify"], help="a reward by its short name")
    run.add_argument("--reward.timeout", type=float, default=10.0, help="seconds a sample's reward may take")
    run.add_argument("--reward.max_failures", type=int, default=0, help="samples that may fail to be scored in a run")
    run.add_argument("--logger.actor_logs", action="store_true", help="show what Ray's actors print")

    for action in parser._actions:
        if action.dest == "ds.param_dtype":
            action.choices = [*action.choices, "fp32"]
    parser.set_defaults(**{"data.input_key": "prompt", "data.label_key": "label"})


# What a flag needs to have an effect: flag -> (needed flag, its values). Checked for flags that were given.
NEEDS = {
    "alpha_mode": ("loss", GROUP_LOSSES),
    "apo.alpha": ("alpha_mode", ("fixed",)),
    "apo.alpha_max": ("alpha_mode", ("guarded", "ess")),
    "apo.alpha_min": ("alpha_mode", ("guarded", "ess")),
    "apo.rho": ("alpha_mode", ("guarded", "ess")),
    "apo.lam": ("alpha_mode", ("guarded",)),
    "apo.reward_scale": ("alpha_mode", ("guarded",)),
    "apo.reward_scale_mode": ("alpha_mode", ("guarded",)),
    "apo.baseline_init": ("alpha_mode", ("guarded",)),
    "apo.confidence": ("alpha_mode", ("guarded",)),
    "apo.gamma": ("alpha_mode", ("ess",)),
    "apo.ess_weights": ("alpha_mode", ("ess",)),
    "apo.ess_scope": ("alpha_mode", ("ess",)),
    "apo.anchor_interval": ("apo.anchor", ("lagged",)),
    "apo.anchor_beta": ("apo.anchor", ("ema",)),
    "apo.logprob_const": ("apo.logprob_reduction", ("const",)),
}
EVERY_LOSS = ("apo.save_rollouts", "apo.load_rollouts", "apo.timeout")

# OpenRLHF's flags that a group objective replaces, by prefix.
REPLACED_BY_GROUP_LOSS = (
    "actor.eps_clip",
    "actor.dual_clip",
    "actor.policy_loss_type",
    "actor.loss_agg_mode",
    "actor.entropy_coef",
    "actor.aux_loss_coef",
    "algo.",
    "reward.clip_range",
    "reward.overlong",
    "reward.stop_properly",
    "rollout.micro_batch_size",
    "ref.",
    "train.dynamic_batch_enable",
    "train.max_tokens_per_gpu",
    "rollout.max_tokens_per_gpu",
    "train.enable_ema",
    "train.ema_beta",
    "ds.enable_sleep",
    "ds.lora",
    "ds.load_in_4bit",
)
# Without a critic, a reward model or OpenRLHF's asynchronous trainer.
WITHOUT_EFFECT = (
    "critic.",
    "train.colocate_critic_reward",
    "reward.model_name_or_path",
    "reward.normalize_enable",
    "reward.num_",
    "reward.offload",
    "ds.value_head_prefix",
    "train.async",
    "train.partial_rollout_enable",
    "train.agent_func_path",
    "data.image_key",
    "data.max_images_per_prompt",
    "actor.freeze_visual_encoder",
    "rollout.vllm_generate_batch_size",
    "algo.dynamic_filtering",
    "ckpt.best_metric_key",
    "vllm.sync_with_ray",
)
