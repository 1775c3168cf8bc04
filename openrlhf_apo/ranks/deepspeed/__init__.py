"""A rank's models as OpenRLHF's Actors in DeepSpeed engines."""

from openrlhf_apo import cpu

cpu.install_for_ranks()
