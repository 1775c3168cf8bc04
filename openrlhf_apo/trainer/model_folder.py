"""Whether a folder is read as a whole model or as a LoRA adapter of one, which lies elsewhere."""

import os

from openrlhf_apo.errors import OptionError
from openrlhf_apo.trainer.plan import OutputPlan

WHOLE, ADAPTER = "config.json", "adapter_config.json"


def is_adapter(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, ADAPTER))


def refuse_other_kind(output: OutputPlan) -> None:
    """Raise OptionError where --ckpt.output_dir holds a model of the kind that this run does not save: one would be
    read together with the other, or in its place."""
    other, kind = (WHOLE, "whole model") if output.saves_adapter else (ADAPTER, "LoRA adapter")
    if os.path.isfile(os.path.join(output.directory, other)):
        raise OptionError(
            f"--ckpt.output_dir {output.directory} holds a {kind} of before ({other}), which would be taken for what "
            "this run saves: give another folder"
        )
