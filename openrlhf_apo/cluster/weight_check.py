"""Whether an engine holds the policy's weights after a sync."""

import logging
from collections.abc import Iterable

from openrlhf_apo.errors import RunError

logger = logging.getLogger(__name__)

# vLLM's tensors of a layer's experts, and what transformers calls them.
EXPERTS = {"w13_weight": "gate_up_proj", "w2_weight": "down_proj"}


def unwritten(
    names: Iterable[str], sent: frozenset[str], written: frozenset[str], packed: dict[str, list[str]]
) -> list[str]:
    """Those of vLLM's parameters that a sync passed over: vLLM does not say it wrote them (`written`), or some of the
    checkpoint's weights that a fused one holds did not come (`sent`). packed: as in `compare_weight_sums`."""
    missing = []
    written = frozenset(map(_plain, written))
    for name in names:
        came = [part in sent for part in checkpoint_names(name, packed)]
        # None came: what has another name in a checkpoint, so vLLM's word is taken.
        if _plain(name) not in written or (any(came) and not all(came)):
            missing.append(name)
    return missing


def refuse_unwritten(missing: list[str]) -> None:
    """Raise RunError naming the first. Before any training the sums agree whether a weight was written or not."""
    if missing:
        raise RunError(
            f"no bucket of the weight sync wrote the engine's {missing[0]} ({len(missing)} such weights): rollouts "
            "would come from another model"
        )


Sums = dict[str, tuple[float, float]]  # {name: (Σ w, Σ w²)}, in float64


def compare_weight_sums(trained: Sums, workers: list[Sums], packed: dict[str, list[str]]) -> None:
    """Raise RunError naming the first of the engine's tensors whose sums are not those of the policy's.

    workers: of one engine, which share its tensors among them (tensor parallelism). packed: {fused module: the
    checkpoint's modules}, whose sums add up. Tensors that vLLM fuses in other ways cannot be told from names; they are
    named in the log, and left to `rollout_mismatch`.
    """
    unknown = []
    for name in workers[0]:
        parts = checkpoint_names(name, packed)
        if parts[0] not in trained and name == "lm_head.weight":
            continue  # tied: the embedding, checked under its own name
        if any(part not in trained for part in parts):
            unknown.append(name)
            continue
        shares, wholes = [worker[name] for worker in workers], [trained[part] for part in parts]
        if not _are_made_of(shares, wholes):
            raise RunError(
                f"the engine's weight {name} is not the policy's after a sync (Σw, Σw²: {_added(shares)} instead of "
                f"{_added(wholes)}): rollouts would come from another model"
            )
    if len(unknown) == len(workers[0]):
        raise RunError(f"no weight of the engine has the name of one of the policy's ({unknown[0]}, ...)")
    if unknown:
        logger.warning(
            "%d of %d engine weights cannot be checked: %s", len(unknown), len(workers[0]), ", ".join(unknown)
        )


def _are_made_of(shares: list[tuple[float, float]], parts: list[tuple[float, float]]) -> bool:
    """shares: a tensor's sums in each worker. Each has all of it, or they have it together; together with keys and
    values several times over, where those have fewer heads than the engine has workers."""
    counts = [[1, n, n] for n in range(2, len(shares) + 1) if len(parts) == 3 and len(shares) % n == 0]
    whole = _added(parts)
    return all(_near(share, whole) for share in shares) or any(
        _near(_added(shares), _added([(n * s, n * s2) for n, (s, s2) in zip(count, parts, strict=True)]))
        for count in [[1] * len(parts), *counts]
    )


def _added(sums: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(first for first, _ in sums), sum(second for _, second in sums)


def _near(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Sums of equal numbers in another order differ by rounding alone."""
    return all(abs(a - b) <= 1e-9 * max(1.0, other[1]) for a, b in zip(one, other, strict=True))


def _plain(name: str) -> str:
    """Without the module that vLLM has around a layer's experts, and leaves out where it says what it wrote."""
    return name.replace(".experts.routed_experts.", ".experts.")


def checkpoint_names(name: str, packed: dict[str, list[str]]) -> list[str]:
    """The policy's names behind a vLLM parameter: fused modules hold several."""
    layer, experts, tail = name.partition(".experts.")
    kind = tail.rpartition(".")[2]
    if kind in EXPERTS:
        return [layer + experts + EXPERTS[kind]]
    for fused, parts in packed.items():
        if f".{fused}." in name:
            return [name.replace(f".{fused}.", f".{part}.") for part in parts]
    return [name]
