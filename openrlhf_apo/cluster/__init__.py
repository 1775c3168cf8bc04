"""Ray: start-up, the policy's and the engine's actors, and waiting for them with limits."""

from openrlhf_apo import cpu
from openrlhf_apo.imports import quick_imports

with quick_imports():  # torch, and what of OpenRLHF is patched: half of what an actor imports
    cpu.install()
