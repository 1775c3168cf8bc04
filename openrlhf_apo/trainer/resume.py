"""Which checkpoint a run goes on from, and that it is a checkpoint of the same run."""

import hashlib
import logging
from pathlib import Path

from openrlhf_apo.errors import OptionError
from openrlhf_apo.trainer.checkpoint_folder import Checkpoint, find_checkpoint, leave_alone
from openrlhf_apo.trainer.plan import OutputPlan

logger = logging.getLogger(__name__)

DIGEST = "sha256:"
SHOWN = 3  # differences


def digest(content: bytes) -> str:
    """What stands in a manifest for something too long or too secret to stand there itself."""
    return DIGEST + hashlib.sha256(content).hexdigest()[:16]


def checkpoint_to_resume(output: OutputPlan, manifest: dict) -> Checkpoint | None:
    """The newest complete checkpoint in --ckpt.path; None where the run starts anew.

    manifest: of this run, with its data. Raises RunError for a damaged checkpoint and OptionError for one of another
    run, naming what differs.
    """
    root = Path(output.checkpoints) / "_actor"
    if not output.resume:
        leave_alone(root)
        return None
    found = find_checkpoint(root)
    if found is None:
        logger.warning("no checkpoint in %s to resume from: starting anew", output.checkpoints)
        return None
    changed = {
        flag: (value, manifest[flag])
        for flag, value in found.manifest.items()
        if flag in manifest and manifest[flag] != value and flag not in output.allowed_changes
    }
    if changed:
        shown = "; ".join(_difference(flag, *values) for flag, values in list(changed.items())[:SHOWN])
        more = f"; and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
        raise OptionError(
            f"the checkpoint {found.folder} is of another run: {shown}{more}. Resume with its settings, start anew in "
            f"another --ckpt.path, or allow it: --ckpt.allow_changed {' '.join(changed)}"
        )
    return found


def _difference(flag: str, then: object, now: object) -> str:
    if str(then).startswith(DIGEST) and str(now).startswith(DIGEST):
        return f"--{flag} has another content now"
    return f"--{flag} was {_shown(then)}, now {_shown(now)}"


def _shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
