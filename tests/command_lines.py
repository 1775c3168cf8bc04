"""Command lines that are resolved or refused, without a model."""

import pytest

from openrlhf_apo.errors import OptionError
from openrlhf_apo.options import resolve

BASE = "--actor.model_name_or_path m --data.prompt_dataset d.jsonl --reward.remote_url http://localhost:1".split()
EVALUATED = "--eval.dataset e.jsonl --eval.steps 2"


def settings(*argv: str, device: str = "cpu"):
    base = BASE[:4] if "--train.agent_func_path" in argv else BASE  # an agent brings its reward along
    return resolve([*base, "--apo.device", device, *argv], check_model_folder=False)


def refused(*argv: str, device: str = "cpu") -> str:
    with pytest.raises(OptionError) as error:
        settings(*argv, device=device)
    message = str(error.value)
    assert "\n" not in message and message.startswith("-")
    return message
