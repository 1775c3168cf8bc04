import json
import os
import sys
import types
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest
from real_runs import AGENT, DIGITS_REWARD
from tiny_models import save_reward_model

from openrlhf_apo import cpu

LONG = ("test_end_to_end", "test_exactness", "test_compare.py", "test_benchmarks", "test_real_data", "test_data")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that no worker is left with one of them at the end."""
    items.sort(key=lambda item: not item.path.name.startswith(LONG))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data; see docs/real_data.md."""
    path = Path(os.environ.get("APO_DATA_DIR", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}: set APO_DATA_DIR")
    return path


@pytest.fixture(autouse=True)
def undecided_device(monkeypatch):
    """A device decided in a test, as a run's driver does, is its own."""
    monkeypatch.setenv(cpu.DEVICE, "")  # so that what the test sets is undone
    monkeypatch.delenv(cpu.DEVICE)


@pytest.fixture(scope="module")
def one_thread():
    """Two test processes share the cores, and on tiny tensors more threads only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_registries():
    """What a test registers, or loads from a file, is gone after it."""
    from openrlhf_apo.options import own_file

    with ExitStack() as stack:
        for registry in (*own_file.REGISTRIES, own_file._LOADED):
            stack.enter_context(patch.dict(registry))
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """An untrained Qwen3-shaped model of 0.1 M parameters with a character tokenizer, for tests of the machinery."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    path = str(tmp_path_factory.mktemp("tiny_model"))
    vocabulary = ["<|endoftext|>", "<|im_end|>", *"0123456789+-= \\boxed{}abcfghijklmnpqrstuvwyz\n"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=vocabulary[1], pad_token=vocabulary[0]
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> str:
    """64 sums as prompts, with solutions."""
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    sums = [(i % 8, i // 8) for i in range(64)]
    rows = [{"prompt": f"{a}+{b}=", "label": str(a + b), "solution": f"{a}+{b} \\boxed{{{a + b}}}"} for a, b in sums]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def training_flags(tiny_model) -> list[str]:
    """Those of a run from saved rollouts, which neither samples nor scores."""
    return [
        *("--actor.model_name_or_path", tiny_model),
        *("--rollout.batch_size", "8", "--train.batch_size", "32", "--train.micro_batch_size", "8"),
        *("--actor.adam.lr", "3e-3", "--actor.lr_scheduler", "constant"),
    ]


@pytest.fixture(scope="session")
def flags(training_flags, sums, tmp_path_factory) -> list[str]:
    reward = tmp_path_factory.mktemp("reward") / "digits.py"
    reward.write_text(DIGITS_REWARD)
    return [
        *training_flags,
        *("--data.prompt_dataset", sums, "--data.max_samples", "48", "--data.max_len", "48"),
        *("--reward.remote_url", str(reward), "--rollout.max_new_tokens", "12"),
    ]


@pytest.fixture(scope="session")
def agent_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("agent") / "agent.py"
    path.write_text(AGENT)
    return str(path)


@pytest.fixture(scope="session")
def reward_model(tiny_model, tmp_path_factory) -> str:
    """The tiny model with other weights and a value head, as OpenRLHF saves a reward model."""
    return save_reward_model(tiny_model, tmp_path_factory.mktemp("reward_model"))


@pytest.fixture
def packages(monkeypatch):
    """Every optional package is installed."""
    monkeypatch.setattr("openrlhf_apo.options.effects.find_spec", lambda name: True)
    monkeypatch.setattr("openrlhf_apo.cpu.has_flash_attn", lambda: True)
    monkeypatch.setattr("openrlhf_apo.options.effects.version", lambda name: "9.9.9")
    hub = types.ModuleType("modelscope.utils.hf_util")
    hub.patch_hub = lambda: None
    for name, module in {"modelscope": hub, "modelscope.utils": hub, hub.__name__: hub}.items():
        monkeypatch.setitem(sys.modules, name, module)
