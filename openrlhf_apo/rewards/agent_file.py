"""`--train.agent_func_path`: a file with OpenRLHF's `AgentExecutor`, which makes conversations and rewards them."""

import importlib.util
import os
import sys

from openrlhf.utils.agent import AgentExecutorBase

from openrlhf_apo.errors import OptionError, in_one_line


def load_agent(path: str) -> AgentExecutorBase:
    """The file's AgentExecutor, of which there is one for all conversations. Raises OptionError for a file that has
    none or cannot be run."""
    spec = importlib.util.spec_from_file_location("agent_module", os.path.realpath(path))
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look names up
    try:
        spec.loader.exec_module(module)
        made = module.AgentExecutor() if hasattr(module, "AgentExecutor") else None
    except (Exception, SystemExit) as error:  # whatever the file raises
        raise OptionError(f"--train.agent_func_path {path} cannot be loaded: {in_one_line(error)}") from None
    if not isinstance(made, AgentExecutorBase):
        raise OptionError(
            f"--train.agent_func_path {path}: it has no class AgentExecutor of OpenRLHF's AgentExecutorBase "
            "(for an AgentInstance, derive it from MultiTurnAgentExecutor)"
        )
    return made
