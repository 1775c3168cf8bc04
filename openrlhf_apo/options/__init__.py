"""The command line: OpenRLHF's flags and ours, from arguments and a file, refused early and in one line when wrong."""

from openrlhf_apo.options.checks import OptionError
from openrlhf_apo.options.settings import resolve

__all__ = ["OptionError", "resolve"]
