"""The work that runs are timed on, and a run of the product on it as a user starts it. No benchmark of its own.

Prompts and answers have exactly as many tokens as asked for: every word is one token, and the end-of-sequence token
lies outside the model's vocabulary, so that no answer ends before its limit on any trainer or engine.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from measure import CACHE, ROOT
from peak_memory import tree_pss

WARM_UP = 3  # steps that medians leave out


@dataclass(frozen=True)
class Size:
    """A Qwen3 with random float32 weights: heads of 32, half as many of keys, an MLP of 3 x hidden, untied."""

    vocabulary: int
    hidden: int
    layers: int


SIZES = {"0.92M": Size(512, 128, 4), "25.7M": Size(15_000, 384, 8)}  # the first is the shape of data/tiny.py


@dataclass(frozen=True)
class Work:
    """A rollout, and the optimizer steps on it."""

    size: str = "0.92M"
    prompts: int = 16
    group: int = 8  # P
    prompt_tokens: int = 16
    response_tokens: int = 32
    updates: int = 1  # optimizer steps per rollout
    steps: int = 20  # rollouts

    @property
    def response_tokens_per_step(self) -> int:
        return self.prompts * self.group * self.response_tokens


REWARD = '''"""A reward that costs nothing: how many sevens an answer has."""

import torch


def reward_func(queries, prompts, labels, **kwargs):
    counts = [query[len(prompt) :].count("7") for query, prompt in zip(queries, prompts)]
    return {"rewards": torch.tensor(counts, dtype=torch.float32)}
'''


def make_model(size: str) -> Path:
    """A Hugging Face folder with the model and its tokenizer; made once."""
    folder = CACHE / f"model_{size}"
    if (folder / "done").exists():
        return folder
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    shape = SIZES[size]
    words = ["<pad>", *map(str, range(1, shape.vocabulary)), "<eos>"]  # <eos> is one more than the model can say
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    heads = shape.hidden // 32
    config = Qwen3Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=3 * shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=shape.vocabulary,
        pad_token_id=0,
        dtype="float32",
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.save_pretrained(folder)
    (folder / "done").touch()
    return folder


def write_inputs(folder: Path, work: Work) -> tuple[Path, Path]:
    """(prompts.jsonl of different prompts for all steps, reward.py), in `folder`."""
    vocabulary = SIZES[work.size].vocabulary
    prompts, reward = folder / "prompts.jsonl", folder / "reward.py"
    with open(prompts, "w", encoding="utf-8") as file:
        for row in range(work.prompts * work.steps):
            words = [str(1 + (row * 7919 + k * 104_729) % (vocabulary - 1)) for k in range(work.prompt_tokens)]
            file.write(json.dumps({"prompt": " ".join(words)}) + "\n")
    reward.write_text(REWARD, encoding="utf-8")
    return prompts, reward


def run_product(work: Work, flags: list[str]) -> dict:
    """A run of train_apo_ray; see `observe`. Raises RuntimeError, naming the log, when it fails."""
    command, metrics = product(work, flags)
    return observe(command, metrics, work)


def product(work: Work, flags: list[str]) -> tuple[list[str], Path]:
    """The command of a run of train_apo_ray, and its metrics file, which is not there yet."""
    out = CACHE / "run"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    prompts, reward = write_inputs(out, work)
    command = [sys.executable, "-m", "openrlhf_apo.cli.train_apo_ray"]
    settings = {
        "actor.model_name_or_path": make_model(work.size),
        "actor.adam.lr": 1e-5,
        "data.prompt_dataset": prompts,
        "data.input_key": "prompt",
        "data.max_len": work.prompt_tokens + work.response_tokens,
        "reward.remote_url": reward,
        "rollout.batch_size": work.prompts,
        "rollout.n_samples_per_prompt": work.group,
        "rollout.max_new_tokens": work.response_tokens,
        "train.batch_size": work.prompts * work.group // work.updates,
        "train.num_episodes": 1,
        "ckpt.output_dir": out / "output",
        "ckpt.path": out / "ckpt",
    }
    for name, value in settings.items():
        command += [f"--{name}", str(value)]
    return [*command, *flags], out / "output" / "metrics.jsonl"


def observe(command: list[str], metrics: Path, work: Work) -> dict:
    """Run a command that writes a line of metrics per step: seconds from its launch to the end of the first step, the
    peak PSS of its processes [GB], and medians over the later steps."""
    log = metrics.parent.parent / "log.txt"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with open(log, "w", encoding="utf-8") as file:
        start = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment)
        first, peak, due = None, 0, start
        root = psutil.Process(process.pid)
        while process.poll() is None:
            now = time.perf_counter()
            if first is None and metrics.exists() and metrics.stat().st_size > 0:
                first = now - start
            if now >= due:
                peak, due = max(peak, tree_pss(root)), now + 0.5
            time.sleep(0.02)
    if process.returncode != 0:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-3:]
        raise RuntimeError(f"exit code {process.returncode}, see {log}: {' | '.join(tail)}")
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    if first is None:  # it ended within 20 ms of its first line
        first = time.perf_counter() - start
    return {"first_step_s": first, "pss_gb": peak / 1e9} | step_medians(rows, work)


def step_medians(rows: list[dict], work: Work) -> dict:
    """Of the steps after the warm-up, where there are any."""
    kept = rows[WARM_UP:] or rows
    wrong = [row["response_length"] for row in rows if row["response_length"] != work.response_tokens]
    if wrong:
        raise RuntimeError(f"answers of {wrong[0]} tokens instead of {work.response_tokens}: not the same work")
    step = statistics.median(row["time/step"] for row in kept)
    return {
        "step_s": step,
        "tokens_per_s": work.response_tokens_per_step / step,
        "generate_s": statistics.median(row.get("time/generate", 0.0) for row in kept),  # sampled beside training
        "update_s": statistics.median(row["time/update"] for row in kept),
        "steps_s": [row["time/step"] for row in rows],
    }
