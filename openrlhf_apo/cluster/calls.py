"""Waiting for Ray actors, never for ever."""

import ray
from ray.exceptions import GetTimeoutError

from openrlhf_apo.errors import RunError


def get_all(refs: list, timeout: float, what: str) -> list:
    """ray.get with a limit in seconds. An actor that died or raised ends the run with its own error."""
    try:
        return ray.get(refs, timeout=timeout)
    except GetTimeoutError:
        raise RunError(
            f"{what} gave no answer within {timeout:.0f} s; raise --apo.timeout if it is only slow"
        ) from None
