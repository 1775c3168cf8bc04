"""A token loss to fill in, and what cli.check_loss says of a file."""

from pathlib import Path

from openrlhf_apo.cli.check_loss import main

TOKEN = """
import threading
from dataclasses import dataclass
import torch
from openrlhf_apo.objectives import Terms, TokenLoss, ratio, token_loss
from openrlhf_apo.settings import setting

@token_loss("mine", uses={uses})
@dataclass(eq=False)
class Mine(TokenLoss):
    gain: float = setting({gain}, "a factor", within="(0, 10]")
    aggregation = "{aggregation}"

    def per_token(self, log_probs, old_log_probs, advantages, mask):
        r, none = ratio(log_probs, old_log_probs), torch.zeros_like(mask, dtype=torch.bool)
        {per_token}

{more}
"""
PLAIN = "return -self.gain * r * advantages, none"


def findings_of(path: Path, capsys) -> tuple[int, dict[str, str], str]:
    """Run the command on a file of one loss: (exit code, {label: finding}, stderr)."""
    code = main([str(path)])
    out, err = capsys.readouterr()
    return code, {line[2:28].strip(): line[28:] for line in out.splitlines() if line.startswith("  ")}, err
