"""Which GPUs a run asks Ray for: groups of bundles, each of one GPU and one CPU, that Ray packs onto few machines."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """GPUs of each part, 0 for one that the run does not have. A part in `shared` is on the policy's."""

    policy: int
    engines: int
    reference: int
    reward: int
    shared: tuple[str, ...] = ()

    @property
    def groups(self) -> dict[str, int]:
        """GPUs of each placement group."""
        parts = {name: getattr(self, name) for name in ("policy", "engines", "reference", "reward")}
        return {name: gpus for name, gpus in parts.items() if gpus and name not in self.shared}

    def __str__(self) -> str:
        parts = [f"{name} {gpus} GPU{'s' * (gpus > 1)}" for name, gpus in self.groups.items()]
        on_policys = [name for name in self.shared if getattr(self, name)]
        return ", ".join(parts) + (f"; {' and '.join(on_policys)} on the policy's" if on_policys else "")
