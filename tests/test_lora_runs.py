"""LoRA in whole runs: resumed, saved, loaded; and under DeepSpeed, what checkpoints, syncs and saved models hold."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from ranks import run_ranks
from real_runs import without_clock
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from openrlhf_apo.cli.evaluate import main as evaluate
from openrlhf_apo.embedded.launch import train
from openrlhf_apo.errors import OptionError
from openrlhf_apo.options import resolve, run_plan
from openrlhf_apo.trainer.metrics import read_metrics
from openrlhf_apo.trainer.stop import StopSignals

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(2, 30).view(4, 7)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


LORA = ["--ds.lora.rank", "4", "--actor.adam.lr", "1e-2"]


def run(flags: list[str], out: Path, *more: str) -> list[dict]:
    args = resolve([*flags, *LORA, "--ckpt.output_dir", str(out), "--ckpt.path", str(out / "ckpt"), *more])
    assert args.runtime == "embedded"
    train(run_plan(args), args, io.StringIO(), StopSignals())
    return read_metrics(out / "metrics.jsonl")


RUNS = {
    "ema anchor, KL": "--apo.anchor ema --apo.anchor_beta 0.9 --algo.kl.init_coef 0.05",
    "reference anchor, ADRPO": "--apo.anchor reference --adrpo.enable",
    "grpo, epochs": "--loss grpo --train.max_epochs 2 --actor.gradient_checkpointing_enable",
}


@pytest.mark.parametrize("name", RUNS)
def test_resumed_after_every_rollout_it_is_the_same_run(flags, tmp_path, name):
    few = ["--rollout.n_samples_per_prompt", "4", "--train.batch_size", "16", "--data.max_samples", "24"]
    more = [*RUNS[name].split(), *few, "--ckpt.save_steps", "1", "--ckpt.max_num", "9"]
    straight = tmp_path / "straight"
    rows = without_clock(run(flags, straight, *more))
    assert len(rows) == 3 and all(row["grad_norm"] > 0 and row["rollout_mismatch"] < 1e-5 for row in rows)
    assert rows[-1].get("kl", 1) > 0
    trained = load_file(straight / "adapter_model.safetensors")
    for stopped in (1, 2):
        resumed = tmp_path / str(stopped)
        shutil.copytree(straight, resumed)
        for later in range(stopped + 1, 4):
            shutil.rmtree(resumed / "ckpt" / "_actor" / f"global_step{later}")
        assert without_clock(run(flags, resumed, *more, "--ckpt.load_enable")) == rows
        assert same(load_file(resumed / "adapter_model.safetensors"), trained)


def test_a_run_leaves_its_adapter_or_the_merged_model(flags, sums, tiny_model, tmp_path, capsys):
    few = ["--data.max_samples", "16", "--ckpt.save_steps", "1"]
    run(flags, tmp_path / "adapter", *few)
    run(flags, tmp_path / "merged", *few, "--ckpt.merge_lora")
    written = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= written
    assert not {"model.safetensors", "config.json"} & written
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "Written by openrlhf_apo" in card and "| adapter | LoRA of rank 4, alpha 16, on all-linear |" in card
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny_model
    )
    assert {"model.safetensors", "config.json"} <= {path.name for path in (tmp_path / "merged").iterdir()}
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
    for loaded in (
        AutoModelForCausalLM.from_pretrained(tmp_path / "adapter"),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), str(tmp_path / "adapter")),
    ):
        assert torch.allclose(loaded(IDS).logits, merged, atol=1e-5)
    assert not torch.allclose(AutoModelForCausalLM.from_pretrained(tiny_model)(IDS).logits, merged, atol=1e-3)
    state = torch.load(tmp_path / "adapter/ckpt/_actor/global_step2/embedded.pt", weights_only=True)["backend"]
    assert state["policy"] and all(".lora_" in name for name in state["policy"])

    reward = flags[flags.index("--reward.remote_url") + 1]
    answers = ["--reward", reward, "--data.max_len", "48", "--rollout.max_new_tokens", "12", "--limit", "8"]
    scores = []
    for model in (tmp_path / "adapter", tmp_path / "merged", tiny_model):
        assert evaluate([str(model), sums, *answers, "--json", str(tmp_path / "scores.json")]) == 0
        scores.append(json.loads((tmp_path / "scores.json").read_text())["scores"])
    assert scores[0] == scores[1] != scores[2]
    with pytest.raises(OptionError, match="is a LoRA adapter: merge it, by `python -m openrlhf.cli.lora_combiner"):
        run(flags, tmp_path / "again", "--actor.model_name_or_path", str(tmp_path / "adapter"))
    with pytest.raises(
        OptionError, match="holds a LoRA adapter of before .adapter_config.json.*: give another folder"
    ):
        run(flags, tmp_path / "adapter", *few, "--ckpt.merge_lora")
    with pytest.raises(OptionError, match="holds a whole model of before .config.json.*: give another folder"):
        run(flags, tmp_path / "merged", *few)
    assert (tmp_path / "merged" / "model.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------------------
# DeepSpeed: what a checkpoint, a sync and a saved model hold, under every ZeRO stage.

STAGES = """
import json, os, sys
from functools import partial
from types import SimpleNamespace
import torch, torch.distributed as dist
from openrlhf_apo.ranks.deepspeed.strategy import ApoStrategy, RankPlan
from spmd import ADAM, settings
from openrlhf_apo.cluster import policy
from openrlhf_apo.cluster.buckets import unpack
from openrlhf_apo.ranks.deepspeed.anchor_weights import AdapterAnchor
from openrlhf_apo.ranks.deepspeed.backend import DeepSpeedBackend
from openrlhf_apo.ranks.deepspeed.weight_average import writable
from openrlhf_apo.ranks.lora import Adapter
from openrlhf_apo.ranks.micro_batch import MicroBatch
from openrlhf_apo.trainer.samples import Sample
from openrlhf.models import Actor
from transformers import AutoModelForCausalLM, AutoTokenizer

class Keep:
    every_rank, device = False, "cpu"
    def __init__(self):
        self.sent = {}
    def send(self, slots, buffer):
        self.sent |= dict(unpack(slots, buffer))

torch.set_num_threads(1)
policy.bucket_bytes = lambda: 50_000
path, folder, kind = sys.argv[1:]
packed, dtype = kind == "4bit", "fp32" if kind == "fp32" else "bf16"
samples = [Sample(0, "p", "", "t", [2, 3], [4, 5, 6], "", [-1.0] * 3, False, 0.0)]
batch = MicroBatch.of(samples, 0)

def start(stage, resume=None):
    args = settings({"step_size": 8}, stage)
    args.ds.param_dtype, args.ckpt = dtype, SimpleNamespace(merge_lora=False)
    strategy = ApoStrategy(args, RankPlan(), resume)
    strategy.setup_distributed()
    torch.manual_seed(0)
    model = Actor(path, attn_implementation="sdpa", param_dtype=dtype, load_in_4bit=packed, lora_rank=2,
                  target_modules="all-linear", ds_config=strategy.get_ds_train_config())
    optimizer = {"optim": "adam", "adam": ADAM | {"lr": 0.05}, "lr_scheduler": "constant", "max_norm": 0.0,
                 "scheduler_steps": 100}
    actor = policy.PolicyActor.__new__(policy.PolicyActor)
    actor.strategy = strategy
    actor.actor, _, scheduler = strategy.prepare((model, optimizer))
    adapter = Adapter(actor.actor.model.module, partial(writable, sharded=stage == 3))
    anchor = AdapterAnchor(actor.actor, stage)
    return actor, DeepSpeedBackend(strategy, actor.actor, scheduler, anchor, actor.actor, adapter=adapter)

def log_probs(backend, weights="policy"):
    with torch.no_grad():
        return backend.forward(weights, batch)[0]

def step(backend):
    log_probs, _ = backend.forward("policy", batch, train=True)
    backend.backward(log_probs.sum())
    backend.step()

for stage in (0, 1, 2, 3):
    if (dtype == "bf16" and stage == 0) or (packed and stage == 3):
        continue
    actor, backend = start(stage)
    base = log_probs(backend)
    assert torch.equal(log_probs(backend, "reference"), base) and torch.equal(log_probs(backend, "anchor"), base)
    for _ in range(2):
        step(backend)
    trained = log_probs(backend)
    assert not torch.allclose(trained, base, atol=1e-2)
    assert torch.equal(log_probs(backend, "reference"), base) and torch.equal(log_probs(backend, "anchor"), base)
    assert torch.equal(log_probs(backend), trained)
    backend.update_anchor(0.0)
    assert torch.equal(log_probs(backend, "anchor"), trained)
    whole, average = backend.anchor.state_dict(), backend.anchor.average
    assert set(whole) == set(backend.adapter.parameters)
    backend.anchor = AdapterAnchor(actor.actor, stage)
    assert torch.equal(log_probs(backend, "anchor"), base)
    backend.anchor.load_state_dict(whole)
    assert all(torch.equal(value, average[name]) for name, value in backend.anchor.average.items())
    assert torch.equal(log_probs(backend), trained)

    actor.connect_engines(Keep)
    actor.send_weights()
    sums = actor.weight_sums()
    assert torch.equal(log_probs(backend), trained)
    out = f"{folder}/{stage}"
    tokenizer = AutoTokenizer.from_pretrained(path)
    backend.strategy.save_model(actor.actor, tokenizer, out + "/adapter")
    backend.strategy.args.ckpt.merge_lora = True
    backend.strategy.save_model(actor.actor, tokenizer, out + "/merged")
    backend.strategy.save_ckpt(actor.actor.model, out + "/ckpt", "one", client_state={"mine": 1})
    dist.barrier()
    if dist.get_rank() == 0:
        sent = actor.sender.sent
        plain = AutoModelForCausalLM.from_pretrained(path, dtype=sent["lm_head.weight"].dtype)
        assert sent.keys() == dict(plain.named_parameters()).keys() == sums.keys()
        assert sums["lm_head.weight"] == (sent["lm_head.weight"].double().sum().item(),
                                          sent["lm_head.weight"].double().square().sum().item())
        plain.load_state_dict(sent)
        merged = AutoModelForCausalLM.from_pretrained(out + "/merged", dtype=sent["lm_head.weight"].dtype)
        assert all(torch.equal(weight, sent[name]) for name, weight in merged.named_parameters())
        as_trained = {"quantization_config": actor.actor.model.module.config.quantization_config} if packed else {}
        adapted = AutoModelForCausalLM.from_pretrained(
            out + "/adapter", dtype=sent["lm_head.weight"].dtype, **as_trained)
        for model in (plain, adapted):
            logits = model(batch.sequences).logits.float().log_softmax(-1)[:, :-1]
            got = logits.gather(-1, batch.sequences[:, 1:, None])[..., 0] * batch.action_mask
            assert torch.allclose(got, trained, atol=1e-4 if dtype == "fp32" else 5e-2), (stage, got, trained)
    saved = [torch.load(os.path.join(root, name), weights_only=False)
             for root, _, names in os.walk(out + "/ckpt") for name in names if name.endswith("model_states.pt")]
    for state in saved:
        held = {**(state["module"] or {}), **(state.get("frozen_param_fragments") or {})}
        held = {name for name in held if ".base_layer.weight." not in name}  # the scales of packed weights
        assert held and all(".lora_" in name for name in held), (stage, [n for n in held if ".lora_" not in n][:3])
    dist.barrier()

    step(backend)
    after = log_probs(backend)
    _, backend = start(stage, "one")
    _, state = backend.strategy.load_ckpt(backend.policy.model, out + "/ckpt")
    assert state["mine"] == 1
    assert torch.equal(log_probs(backend), trained), stage
    step(backend)
    assert torch.equal(log_probs(backend), after), stage
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["fp32", "bf16", "4bit"])
def test_deepspeed_keeps_sends_and_saves_the_adapter(tiny_model, tmp_path, kind):
    run_ranks(["-c", STAGES, tiny_model, str(tmp_path), kind], 2, tmp_path)
