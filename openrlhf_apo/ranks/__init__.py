"""What one policy rank does, over OpenRLHF's Actor and its DeepSpeed engine. Knows of no Ray."""

from openrlhf_apo import cpu

cpu.install_for_ranks()
