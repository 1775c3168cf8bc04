"""The flags this project adds beside those of its losses and controllers (owners.py)."""

import argparse

from openrlhf_apo.alpha import CONTROLLERS
from openrlhf_apo.objectives import GROUP_LOSSES, TOKEN_LOSSES
from openrlhf_apo.options.owners import add_owned_flags

# What a flag needs, as pip has it.
PACKAGES = {"logger.swanlab_project": "swanlab", "logger.trackio_project": "trackio"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--config",
        nargs="+",
        metavar="FILE.yaml",
        help="set any flag from files; a later one wins, and the command line over all",
    )
    add(
        "--dry_run",
        action="store_true",
        help="read the data, call a reward file once, print the settings, given ones first, and stop",
    )
    add(
        "--loss",
        metavar="NAME",
        help=f"the objective: {', '.join(GROUP_LOSSES)} (group losses), {', '.join(TOKEN_LOSSES)} (token losses), or "
        "openrlhf: OpenRLHF's own step by its flags; default apo",
    )
    add("--loss_path", metavar="FILE.py", help="a file with losses or alpha controllers of your own, docs/own_loss.md")
    add(
        "--alpha_mode",
        choices=list(CONTROLLERS),
        default="guarded",
        help="how alpha is chosen, for a loss that has one (default guarded)",
    )
    add_owned_flags(parser)

    switches = parser.add_argument_group("beside any loss")
    switches.add_argument(
        "--adrpo.enable", action="store_true", help="KL to the reference by advantage, in place of --algo.kl.*"
    )
    switches.add_argument(
        "--guidance.enable", action="store_true", help="a share of each group starts from a reference solution"
    )

    switches.add_argument(
        "--algo.kl.no_use_loss",
        dest="algo.kl.use_loss",
        action="store_false",
        default=False,
        help="KL in the reward, where a token loss has it in the loss; the estimator's default is k1 then",
    )

    run = parser.add_argument_group("run")
    add = run.add_argument
    add(
        "--runtime",
        choices=["auto", "embedded", "ray"],
        default="auto",
        help="embedded: all in one process, on plain torch; ray: Ray, DeepSpeed and vLLM; auto: embedded without a "
        "GPU, for one rank, where no flag asks for ray (default auto)",
    )
    add(
        "--apo.device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="what the run is on; auto: cuda where this machine has it (default auto)",
    )
    add(
        "--apo.max_generations",
        type=int,
        default=10,
        help="with --algo.dynamic_filtering_enable: batches that one rollout may sample (default 10)",
    )
    add("--apo.save_rollouts", metavar="DIR", help="write every rollout's scored samples")
    add("--apo.load_rollouts", metavar="DIR", help="train from saved rollouts, without an engine")
    add(
        "--apo.check_weights",
        action="store_true",
        help="compare engine and policy after every weight sync, not only after the first",
    )
    add(
        "--apo.sync",
        choices=["openrlhf", "buckets"],
        help="how weights get to the engines: tensor by tensor, or many at once (default openrlhf; buckets on a CPU, "
        "with --ds.lora.rank and for a mixture of experts)",
    )
    add(
        "--apo.max_mismatch",
        type=float,
        default=1.0,
        help="nats per token that engine and policy may differ by (rollout_mismatch) before the run stops (default 1)",
    )
    add(
        "--apo.max_equal_rollouts",
        type=int,
        metavar="N",
        help="stop after N rollouts in a row in which every group has equal rewards (default: warn, and go on)",
    )
    add(
        "--apo.old_log_probs",
        choices=["weights", "engine"],
        default="weights",
        help="with --train.async_enable: log-probs of the policy that sampled a rollout, from its weights, which are "
        "kept beside the policy's, or as the engine reported them (default weights)",
    )
    add("--apo.timeout", type=float, default=3600.0, help="seconds any one wait may take (default 3600)")
    add(
        "--ckpt.allow_changed",
        nargs="+",
        metavar="FLAG",
        help="go on from a checkpoint although these flags had another value when it was written",
    )
    add(
        "--ckpt.merge_lora",
        action="store_true",
        help="with --ds.lora.rank: save whole models with the adapter merged, and not the adapter",
    )
    add(
        "--train.max_restarts",
        type=int,
        default=0,
        help="how often a run under Ray whose process died starts anew from its last checkpoint (default 0)",
    )
    add(
        "--rollout.max_engine_restarts",
        type=int,
        default=0,
        help="how often an engine that died is replaced, in a run that goes on (default 0)",
    )
    add("--actor.trust_remote_code", action="store_true", help="run the code that comes with a model")
    add(
        "--reward",
        dest="reward.name",
        nargs="+",
        metavar="FILE.py|URL|math_verify",
        help="math_verify, or what --reward.remote_url takes; several are added up",
    )
    add(
        "--reward.weights",
        type=float,
        nargs="+",
        metavar="W",
        help="one for each of several rewards, in their order, a reward model's last (default 1 for all)",
    )
    add(
        "--reward.timeout",
        type=float,
        help="seconds a sample's reward may take (default 10 for math_verify, 180 for a function, 900 for a server)",
    )
    add("--reward.max_failures", type=int, default=0, help="samples that may fail to be scored in a run (default 0)")
    add(
        "--reward.isolate",
        action="store_true",
        help="run a reward file in processes of its own, without the run's secrets, that may be killed",
    )
    add("--eval.ends", action="store_true", help="evaluate before the first and after the last rollout, too")
    add("--logger.swanlab_project", metavar="NAME", help="log to SwanLab, as SWANLAB_MODE and SWANLAB_API_KEY say")
    add("--logger.trackio_project", metavar="NAME", help="log to trackio, on this machine's disk (TRACKIO_DIR)")
    add("--logger.actor_logs", action="store_true", help="show what Ray's actors print")

    for action in parser._actions:
        if action.dest == "ds.param_dtype":
            action.choices = [*action.choices, "fp32"]
    parser.set_defaults(**{"data.input_key": "prompt"})
