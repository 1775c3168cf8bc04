"""The flags this project adds, and which of all flags have an effect when."""

import argparse

from openrlhf_apo.objectives import TOKEN_LOSSES
from openrlhf_apo.objectives.dapo import OVERLONG_SHARE

# OpenRLHF's own experience maker and PPO step, by OpenRLHF's own flags: the baseline, and the way to what only it has.
OPENRLHF = "openrlhf"
GRPO_KL = {"algo.kl.init_coef": 0.04, "algo.kl.use_loss": True}
# Defaults beside those of the loss's own fields, where a paper has them.
LOSS_DEFAULTS = {
    "grpo": GRPO_KL,
    "g2rpo_a": GRPO_KL,
    "dapo": {"algo.dynamic_filtering_enable": True},
    OPENRLHF: {"algo.advantage.estimator": "group_norm"},
}
EPS_CLIP = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "g2rpo_a")
WITHOUT_ALPHA = ("adpo_softmax", "adpo_plackett_luce", "adpo_pairwise")  # of the group losses
WITHOUT_TARGET = ("adpo_plackett_luce", "adpo_pairwise")  # rewards enter by their order alone
DUAL_CLIP = ("grpo", "dr_grpo", "dapo", "gspo", "bapo", "g2rpo_a")
ALPHA_MODES = ("fixed", "guarded", "ess")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE.yaml", help="set any flag from a file; the command line wins")
    parser.add_argument("--dry_run", action="store_true", help="print the resolved settings and stop")
    parser.add_argument(
        "--loss",
        metavar="NAME",
        help="the objective: apo (default), adpo_softmax, adpo_plackett_luce, adpo_pairwise, "
        f"{', '.join(TOKEN_LOSSES)}, one of --loss_path, or openrlhf: OpenRLHF's own step by its flags",
    )
    parser.add_argument("--loss_path", metavar="FILE.py", help="a file of one's own group losses (docs/own_loss.md)")
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

    token = parser.add_argument_group("token objectives", "defaults are the papers' (docs/algorithms.md)")
    add = token.add_argument
    add("--bapo.rho", type=float, default=0.5, help="bapo: least share of positive samples in the surrogate")
    add("--bapo.low_range", type=float, nargs=2, default=(0.6, 0.9), help="bapo: range of the lower ratio bound")
    add("--bapo.high_range", type=float, nargs=2, default=(1.2, 3.0), help="bapo: range of the upper ratio bound")
    add("--bapo.step", type=float, default=0.05, help="bapo: by which a bound moves")
    add("--gtpo.gamma", type=float, default=0.1, help="gtpo: weight of an answer's entropy in its advantage")
    add("--gtpo.conflict_weight", type=float, default=2.0, help="gtpo: of conflict tokens in good answers")
    add("--alpha_ppo.alpha", type=float, default=0.5, help="alpha_ppo: order of the divergence")
    add("--alpha_ppo.beta", type=float, default=1.0, help="alpha_ppo: weight of the divergence")
    add("--g2rpo_a.share", type=float, default=1 / 6, help="g2rpo_a: share of a group that is guided")
    add("--g2rpo_a.length", type=int, default=3072, help="g2rpo_a: tokens of guidance at first and at most")
    add("--g2rpo_a.solution_key", default="solution", help="g2rpo_a: column of the reference solutions")

    adrpo = parser.add_argument_group("adrpo", "KL to the reference by advantage (arXiv 2510.18053), beside any loss")
    adrpo.add_argument("--adrpo.enable", action="store_true", help="beta_i = beta_0 - A_i, in place of --algo.kl.*")
    adrpo.add_argument("--adrpo.beta_0", type=float, default=0.04, help="of an average answer")
    adrpo.add_argument("--adrpo.beta_min", type=float, default=0.0, help="lower bound; below 0 rewards divergence")
    adrpo.add_argument("--adrpo.beta_max", type=float, default=1.0, help="upper bound")

    run = parser.add_argument_group("run", "for every loss")
    run.add_argument(
        "--apo.max_generations",
        type=int,
        default=10,
        help="with --algo.dynamic_filtering_enable: batches that one rollout may sample",
    )
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


# What a flag needs to have an effect: flag -> (needed flag, its values). Checked for flags that were given. Flags of
# one loss (`bapo.`, ...) need that loss; `apo.` and `alpha_mode` see checks.py.
NEEDS = {
    "apo.weight_clip": ("loss", ("apo",)),
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
    "apo.max_generations": ("algo.dynamic_filtering_enable", (True,)),
    "algo.dynamic_filtering_range": ("algo.dynamic_filtering_enable", (True,)),
    "actor.eps_clip": ("loss", (*EPS_CLIP, OPENRLHF)),
    "actor.eps_clip_low_high": ("loss", (*EPS_CLIP, OPENRLHF)),
    "actor.dual_clip": ("loss", (*DUAL_CLIP, OPENRLHF)),
    "adrpo.beta_0": ("adrpo.enable", (True,)),
    "adrpo.beta_min": ("adrpo.enable", (True,)),
    "adrpo.beta_max": ("adrpo.enable", (True,)),
}
OF_ONE_LOSS = ("bapo", "gtpo", "alpha_ppo", "g2rpo_a")
EVERY_LOSS = ("apo.save_rollouts", "apo.load_rollouts", "apo.timeout", "apo.max_generations")
NEED_ALPHA = ("alpha_mode", *(flag for flag, (needed, _) in NEEDS.items() if needed == "alpha_mode"))

# OpenRLHF's flags, by prefix, that only its own step (--loss openrlhf) reads.
ONLY_OPENRLHF = (
    "actor.policy_loss_type",
    "actor.loss_agg_mode",
    "actor.aux_loss_coef",
    "algo.advantage.",
    "algo.kl.target",
    "algo.kl.horizon",
    "algo.kl.unbiased_gradient",
    "reward.clip_range",
    "rollout.micro_batch_size",
    "ref.",
    "train.colocate_actor_ref",
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
    "ckpt.best_metric_key",
    "vllm.sync_with_ray",
)


def loss_defaults(loss: str, max_new_tokens: int | None) -> dict:
    """{dest: value} of the papers' settings of a loss, where they are not OpenRLHF's defaults."""
    defaults: dict = {"algo.kl.init_coef": 0.0} if loss != OPENRLHF else {}
    if loss in EPS_CLIP:
        fields = TOKEN_LOSSES[loss]()
        defaults["actor.eps_clip_low_high"] = (fields.eps_low, fields.eps_high)
    if loss == "bapo":
        defaults["actor.dual_clip"] = 3.0
    if loss == "dapo" and max_new_tokens:
        defaults["reward.overlong_buffer_len"] = OVERLONG_SHARE * max_new_tokens
    return defaults | LOSS_DEFAULTS.get(loss, {})
