"""Ray's placement groups for a run."""

from ray.util.placement_group import PlacementGroup, placement_group

from openrlhf_apo.errors import RunError
from openrlhf_apo.trainer.placement import Placement


def place(placement: Placement, timeout: float) -> dict[str, PlacementGroup]:
    """The placement group of each part that the run has."""
    places = {}
    for part, gpus in placement.groups.items():
        places[part] = placement_group([{"GPU": 1, "CPU": 1}] * gpus, strategy="PACK")
        # Not pg.ready(), a task: the worker that ran it could not become an actor with a GPU any more.
        if not places[part].wait(timeout):
            raise RunError(
                f"Ray has not placed {gpus} GPUs within {timeout:.0f} s; raise --apo.timeout if it is only slow"
            )
    return places | {part: places["policy"] for part in placement.shared if getattr(placement, part)}
