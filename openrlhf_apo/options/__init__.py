"""The command line: OpenRLHF's flags and ours, from arguments and a file, refused early and in one line when wrong."""

from openrlhf_apo.options.plan import run_plan, start_up_warnings
from openrlhf_apo.options.resolve import resolve

__all__ = ["resolve", "run_plan", "start_up_warnings"]
