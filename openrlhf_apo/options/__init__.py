"""The command line: OpenRLHF's flags and ours, from arguments and a file, refused early and in one line when wrong."""

from openrlhf_apo.options.flags import GROUP_LOSSES, TOKEN_LOSSES
from openrlhf_apo.options.settings import OptionError, alpha_settings, resolve

__all__ = ["GROUP_LOSSES", "TOKEN_LOSSES", "OptionError", "alpha_settings", "resolve"]
