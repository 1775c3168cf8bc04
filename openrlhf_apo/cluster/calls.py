"""Waiting for Ray actors, never for ever and never silently; what went wrong in one of them, in one line."""

import logging
import re
import socket
import statistics
import time
from collections import defaultdict, deque

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from openrlhf_apo.errors import ProcessDied, RunError, in_one_line

logger = logging.getLogger(__name__)

SLOW = 3.0  # times the median, after which a line says what is being waited for
SHORTEST_WATCH = 30.0  # seconds; what is quick may well take longer once
PEER_SECONDS = 5.0  # that Ray may take to see that an actor is gone
HEAD_SECONDS = 10.0  # that Ray's head may take to answer
FIRST_WATCH = 120.0  # of what was never waited for
_seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=50))  # of the last waits, by what for


def get_all(refs: list, timeout: float, what: str) -> list:
    """ray.get with a limit in seconds. The first actor that fails ends the wait, whatever the others do.

    Raises RunError saying what of a failed actor decided the end, and ProcessDied for one that is gone.
    """
    _ask_for_head()
    start, before = time.monotonic(), _seconds[what]
    watch = max(SHORTEST_WATCH, SLOW * statistics.median(before)) if before else FIRST_WATCH
    results, pending = {}, list(refs)
    while pending:
        waited = time.monotonic() - start
        if waited >= timeout:
            raise RunError(f"{what} gave no answer within {timeout:.0f} s; raise --apo.timeout if it is only slow")
        done, pending = ray.wait(pending, timeout=min(watch, timeout - waited))
        for ref in done:
            try:
                results[ref] = ray.get(ref)
            except RayError as error:
                cause = error if _died(error) else _dead_peer([each for each in refs if each not in results]) or error
                raise (ProcessDied if _died(cause) else RunError)(f"{what} failed, {_reason(cause)}") from error
        if not done:
            late = ", ".join(str(i) for i, ref in enumerate(refs) if ref in pending)
            logger.warning(
                "%s: nothing from actor %s of %d for %.0f s%s; the run stops after %.0f s (--apo.timeout)",
                *(what, late, len(refs), time.monotonic() - start),
                f" (usually {statistics.median(before):.0f} s)" if before else "",
                timeout,
            )
    before.append(time.monotonic() - start)
    return [results[ref] for ref in refs]


def _died(error: RayError) -> bool:
    if isinstance(error, RayActorError):
        return not error.actor_init_failed
    return isinstance(error, RayTaskError) and isinstance(error.cause, RayActorError)


def _dead_peer(refs: list) -> RayError | None:
    """An actor that died, where there is one: the others fail as their connections to it break, at times before Ray
    has seen that it is gone."""
    ended, _ = ray.wait(refs, num_returns=len(refs), timeout=PEER_SECONDS)
    for ref in ended:
        try:
            ray.get(ref)
        except RayError as error:
            if _died(error):
                return error
    return None


def _ask_for_head() -> None:
    """Ray goes on without its head for a minute, then ends every process where it stands, this one too."""
    address = ray.get_runtime_context().gcs_address
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), HEAD_SECONDS).close()
    except OSError:
        raise ProcessDied(
            f"Ray's head process gcs_server ({address}) is gone: killed from outside, or by the kernel for memory "
            "(see dmesg)"
        ) from None


def _reason(error: RayError) -> str:
    text = str(error)
    pid, ip = (re.search(rf"\b{key}[=:] ?([\w.]+)", text) for key in ("pid", "ip"))
    where = f"process {pid[1]} on {ip[1]}" if pid and ip else "place unknown"
    if isinstance(error, RayTaskError) and not isinstance(error.cause, RayActorError):
        said = error.cause if isinstance(error.cause, RunError) else in_one_line(error.cause)
        return f"{said} ({where}; the traceback is in run.log)"
    if isinstance(error, RayActorError) and error.actor_init_failed:
        lines = text.strip().splitlines()
        starts = [i for i, line in enumerate(lines) if re.match(r"\s*[\w.]*(Error|Exception|Exit)\b.*: ", line)]
        said = " ".join(line.strip() for line in lines[starts[-1] if starts else -1 :])
        return f"{said[:500]} ({where}; the traceback is in run.log)"
    if isinstance(error, RayActorError | RayTaskError):
        return f"its actor died ({where}): killed from outside, or by the kernel for memory (see dmesg)"
    return in_one_line(error)
