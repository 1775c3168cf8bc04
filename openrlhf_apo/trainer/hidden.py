"""What of a command is not shown to those who read a run's files."""

import re

SECRET = "logger.wandb.key"  # the only flag whose value is never shown


def hide_key(command: str) -> str:
    """A shell's command, in which the key is named and not shown."""
    return re.sub(rf"(--{SECRET}[ =])\S+", r'\1"$WANDB_API_KEY"', command)


def hide_in_addresses(text: str) -> str:
    """User and query of an address may hold a secret."""
    text = re.sub(r"(https?://)[^\s/@\"',]+@", r"\1...@", text)
    return re.sub(r"(https?://[^\s?\"',]+\?)[^\s\"',]+", r"\1...", text)
