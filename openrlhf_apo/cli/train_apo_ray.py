"""Train by APO, GRPO or GSPO on Ray.

    python -m openrlhf_apo.cli.train_apo_ray --loss apo --alpha_mode guarded \
        --actor.model_name_or_path MODEL --data.prompt_dataset prompts.jsonl --reward math_verify

Takes every flag of `openrlhf.cli.train_ppo_ray` 0.11.2, with the same meaning, and those of `--help`'s groups "apo"
and "run". Exit code 2: a setting or the data cannot be used; 1: the run failed.
"""

import logging
import os
import sys
import traceback

from openrlhf_apo.options.settings import OptionError, resolve, start_up_warnings


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    for noisy in ("httpx", "datasets", "filelock", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        args = resolve(sys.argv[1:] if argv is None else argv)
    except OptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for warning in start_up_warnings(args):
        logging.warning(warning)
    if args.dry_run:
        _print_settings(args)
        return 0
    return _train(args)


def _train(args) -> int:
    from openrlhf_apo import cpu

    cpu.install()
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    from openrlhf_apo.trainer.prompts import DataError
    from openrlhf_apo.trainer.ray_calls import RunError
    from openrlhf_apo.trainer.ray_launch import train

    try:
        train(args)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (RayTaskError, RayActorError) as error:
        print(error, file=sys.stderr)
        print(f"error: an actor failed: {str(error).rstrip().splitlines()[-1]}", file=sys.stderr)
        return 1
    except ValueError as error:  # a partial group, a metric that is not finite: the message says which
        traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        ray.shutdown()
    return 0


def _print_settings(args, prefix: str = "") -> None:
    for name, value in sorted(vars(args).items()):
        if hasattr(value, "__dict__"):
            _print_settings(value, f"{prefix}{name}.")
        elif f"{prefix}{name}" not in ("given", "config", "dry_run", "local_rank"):
            print(f"{prefix}{name}: {value}")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the thread of a hung reward function would keep the interpreter waiting for ever
