"""How a run ends that meets a fault: what the command does after its flags are read, in this process."""

import io
from pathlib import Path

from openrlhf_apo.cli.train_apo_ray import _train
from openrlhf_apo.errors import OptionError
from openrlhf_apo.options import resolve, run_plan
from openrlhf_apo.trainer.output_lock import lock_outputs
from openrlhf_apo.trainer.stop import StopSignals

MODEL, DATA, REWARD = "--actor.model_name_or_path", "--data.prompt_dataset", "--reward.remote_url"


def outcome(flags: list[str], out: Path, *more: str) -> tuple[int, str]:
    """(exit code, the one line that says why it is not 0) of an embedded run in `out`."""
    where = ["--runtime", "embedded", "--ckpt.output_dir", str(out), "--ckpt.path", str(out / "ckpt")]
    try:
        args = resolve([*flags, *where, *more])
        plan = run_plan(args)
        locks = lock_outputs({"--ckpt.output_dir": plan.output.directory})
    except OptionError as error:
        return 2, _one_line(str(error))
    try:
        code, error = _train(plan, args, io.StringIO(), StopSignals())
    finally:
        for lock in locks:
            lock.close()
    return code, _one_line(error or "")


def _one_line(error: str) -> str:
    assert "\n" not in error, error
    return error
