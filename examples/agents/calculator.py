"""A calculator for a model that does sums: an agent of OpenRLHF's, which goes with openrlhf.cli.train_ppo_ray as well.

A turn that is `calc(27*38)` is answered with `1026`. Any other turn is the model's answer, and ends the conversation.
"""

import re

import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor

CALL = re.compile(r"calc\((\d{1,4})([+*-])(\d{1,4})\)", re.ASCII)
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
MOST_CALLS = 2


class AgentInstance(AgentInstanceBase):
    """The environment of one conversation."""

    def __init__(self, *args, **kwargs):
        self.calls = 0

    async def reset(self, states: dict, **kwargs) -> dict:
        return {"observation": states["observation"]}  # the prompt, after the chat template

    async def step(self, states: dict, **kwargs) -> dict:
        """states: observation_text, all so far; action_text, the model's turn; label."""
        action, call = states["action_text"], CALL.fullmatch(states["action_text"])
        done = call is None or self.calls == MOST_CALLS
        reward, feedback = 0.0, ""
        if done:
            reward = float(action == rf"\boxed{{{states['label']}}}")
        else:
            self.calls += 1
            value = OPERATIONS[call[2]](int(call[1]), int(call[3]))
            feedback = f"<|user|>{value}<|im_end|><|assistant|>"  # the model's chat template
        return {
            "rewards": torch.tensor(reward),
            "environment_feedback": feedback,
            "done": done,
            "extra_logs": {"calls": torch.tensor(self.calls)},
        }


class AgentExecutor(MultiTurnAgentExecutor):
    def __init__(self):
        super().__init__(AgentInstance)
