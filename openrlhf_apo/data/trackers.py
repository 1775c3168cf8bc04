"""What a run logs to beside its metrics.jsonl: OpenRLHF's loggers, SwanLab and trackio."""

import copy
import json
import shlex
import sys
from types import ModuleType, SimpleNamespace

from openrlhf_apo.errors import OptionError
from openrlhf_apo.trainer.hidden import hide_in_addresses, hide_key
from openrlhf_apo.trainer.plan import RunPlan


class ProjectTracker:
    """SwanLab or trackio, of which both have `init`, `log` and `finish`: a run in a project. How they log in, and
    whether they do, they read from their own environment variables."""

    def __init__(self, module: ModuleType, project: str, name: str, config: dict, **more):
        self.module = module
        module.init(project=project, name=name, config=config, **more)

    def log_train(self, rollout: int, metrics: dict) -> None:
        self._log("train", rollout, metrics)

    def log_eval(self, rollout: int, metrics: dict) -> None:
        self._log("eval", rollout, metrics)

    def _log(self, kind: str, rollout: int, metrics: dict) -> None:
        self.module.log({f"{kind}/{key}": value for key, value in metrics.items()}, step=rollout)

    def close(self) -> None:
        self.module.finish()


def make_trackers(plan: RunPlan, args: SimpleNamespace) -> list:
    """Those that --logger.* ask for. args: OpenRLHF's settings. Raises OptionError where SwanLab has no login."""
    trackers: list = []
    if args.logger.wandb.key or args.logger.tensorboard_dir:
        from openrlhf.utils.logging_utils import TensorboardLogger, WandbLogger  # imports OpenRLHF

        trackers += [WandbLogger(_without_key(args))] if args.logger.wandb.key else []
        trackers += [TensorboardLogger(args)] if args.logger.tensorboard_dir else []
    settings = json.loads(hide_in_addresses(json.dumps(plan.record.get("settings", {}), default=str)))
    if args.logger.swanlab_project:
        import swanlab

        # Nobody would see what it asks, as stdout is run.log; and what it keeps of a process is its command line.
        quiet = swanlab.Settings(interactive=False, probe={"runtime": False})
        try:
            trackers.append(
                ProjectTracker(
                    swanlab, args.logger.swanlab_project, args.logger.wandb.run_name, settings, settings=quiet
                )
            )
        except RuntimeError as error:
            raise OptionError(
                f"--logger.swanlab_project: {str(error).splitlines()[0]} Set SWANLAB_API_KEY, or SWANLAB_MODE=offline"
            ) from None
    if args.logger.trackio_project:
        import trackio

        trackers.append(
            ProjectTracker(
                trackio, args.logger.trackio_project, args.logger.wandb.run_name, settings, auto_log_cpu=False
            )
        )
    return trackers


def _without_key(args: SimpleNamespace) -> SimpleNamespace:
    """OpenRLHF's logger hands all settings to wandb, where they are shown as the run's: log in before it does. wandb
    also keeps the command line, from sys.argv, which nobody else reads any more."""
    import wandb

    if not wandb.api.api_key:
        wandb.login(key=args.logger.wandb.key)
    args = copy.deepcopy(args)
    args.logger.wandb.key = None
    sys.argv = shlex.split(hide_key(shlex.join(sys.argv)))
    return args
