"""The example of a loop of one's own learns."""

import importlib.util
import shutil
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_reward_of_a_plain_loop_rises(tiny_model, sums, tmp_path, monkeypatch):
    """On a model that has learned nothing, which is soon taught to answer in digits."""
    shutil.copytree(tiny_model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "model")
    shutil.copy(sums, tmp_path / "train.jsonl")
    spec = importlib.util.spec_from_file_location("plain_loop", ROOT / "examples" / "python" / "plain_torch_loop.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "score", lambda response, label: fmean(c.isdigit() for c in response + " "))
    before = torch.random.get_rng_state()
    rewards = example.main(str(tmp_path), rollouts=8)
    torch.random.set_rng_state(before)
    assert fmean(rewards[-2:]) > 1.5 * fmean(rewards[:2]) > 0
