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


def compare_weight_sums(trained: dict, loaded: dict, packed: dict[str, list[str]]) -> None:
    """Raise RunError naming the first of the engine's tensors whose (Σ w, Σ w²) is not that of the policy's.

    packed: {fused module: the checkpoint's modules}, whose sums add up. Tensors that vLLM fuses in other ways cannot
    be told from names; they are named in the log, and left to `rollout_mismatch`.
    """
    unknown = []
    for name, sums in loaded.items():
        parts = checkpoint_names(name, packed)
        if parts[0] not in trained and name == "lm_head.weight":
            continue  # tied: the embedding, checked under its own name
        if any(part not in trained for part in parts):
            unknown.append(name)
            continue
        expected = [sum(trained[part][k] for part in parts) for k in (0, 1)]
        # Sums of equal numbers in another order differ by rounding alone.
        if any(abs(a - b) > 1e-9 * max(1.0, expected[1]) for a, b in zip(sums, expected, strict=True)):
            raise RunError(
                f"the engine's weight {name} is not the policy's after a sync (Σw, Σw²: {tuple(sums)} instead of "
                f"{tuple(expected)}): rollouts would come from another model"
            )
    if len(unknown) == len(loaded):
        raise RunError(f"no weight of the engine has the name of one of the policy's ({unknown[0]}, ...)")
    if unknown:
        logger.warning("%d of %d engine weights cannot be checked: %s", len(unknown), len(loaded), ", ".join(unknown))


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
