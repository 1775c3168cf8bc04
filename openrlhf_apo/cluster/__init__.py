"""Ray: start-up, the policy's and the engine's actors, and waiting for them with limits."""

from openrlhf_apo import cpu

cpu.install()
