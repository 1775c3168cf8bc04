"""LoRA: one model is policy, reference and anchor; engines get merged weights; files hold the adapter."""

import copy
import json
import shutil
from functools import partial

import pytest
import torch
from peft import PeftModel
from tiny_models import tiny_qwen3
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from openrlhf_apo.embedded.backend import OptimizerPlan, TorchBackend
from openrlhf_apo.errors import OptionError
from openrlhf_apo.options import resolve
from openrlhf_apo.ranks import shared_prompts
from openrlhf_apo.ranks.engine_weights import engine_weights
from openrlhf_apo.ranks.log_probs import has_plain_head, response_log_probs
from openrlhf_apo.ranks.lora import Adapter, add_adapter, save_trained
from openrlhf_apo.ranks.micro_batch import MicroBatch
from openrlhf_apo.trainer.samples import Sample

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.arange(2, 30).view(4, 7)
PLAN = OptimizerPlan(0.01, (0.9, 0.95), 1e-8, 0.0, 1.0, "constant", 0.0, 0.0, 10)


def with_adapter(model: nn.Module, targets: str | list[str] = "all-linear") -> PeftModel:
    """Of a policy in mid training: B is not 0."""
    peft = add_adapter(model, 2, 16, targets)
    torch.manual_seed(1)
    for weight in Adapter(peft).parameters.values():
        weight.data.normal_(0.0, 0.2)
    return peft


def tiny_gpt2() -> nn.Module:
    """Its matrices are transposed, and its output matrix is the embedding."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def batch() -> MicroBatch:
    samples = [
        Sample(0, "p", "", "t", [2, 3, 4], list(range(5, 5 + n)), "", [-1.0] * n, False, 0.0) for n in (3, 5, 2)
    ]
    return MicroBatch.of(samples, 0)


# ---------------------------------------------------------------------------------------------------------------------
# What the engine gets.


@pytest.mark.parametrize("make", [tiny_gpt2, partial(tiny_qwen3, 40), partial(tiny_qwen3, 40, tied=True)])
def test_merged_weights_are_the_policy_under_the_names_of_its_base_model(make):
    plain, policy = make().eval(), with_adapter(make()).eval()  # GPT-2 has dropout
    before = values(policy)
    merged = {each.name: each.merged() for each in engine_weights(policy)}
    assert merged.keys() == dict(plain.named_parameters()).keys()
    assert same(values(policy), before)
    base = values(plain)
    moved = [name for name in merged if not torch.equal(merged[name], base[name])]
    assert len(moved) == sum(".lora_A." in name for name in before) > 0
    for name, weight in plain.named_parameters():
        weight.data.copy_(merged[name])
    assert torch.allclose(plain(IDS).logits, policy(IDS).logits, atol=1e-5)
    assert not torch.allclose(make().eval()(IDS).logits, policy(IDS).logits, atol=1e-2)


def test_bfloat16_is_merged_in_float32_and_rounded_once():
    policy = with_adapter(tiny_qwen3(40)).bfloat16()
    before = values(policy)
    (each,) = [each for each in engine_weights(policy) if each.name == "model.layers.0.self_attn.q_proj.weight"]
    weight, a, b = (part.detach().double() for part in each.parts)
    assert each.merged().dtype == torch.bfloat16
    assert torch.equal(each.merged(), (weight + 8 * (b @ a)).float().bfloat16())
    for _ in range(100):
        [each.merged() for each in engine_weights(policy)]
    assert same(values(policy), before)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"]])
def test_a_base_in_4_bits_is_sent_and_saved_as_the_policy_computes_with_it(tiny_model, tmp_path, targets):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    load = partial(AutoModelForCausalLM.from_pretrained, dtype=torch.bfloat16)
    plain, policy = load(tiny_model), add_adapter(load(tiny_model, quantization_config=nf4), 2, 16, targets)
    merged = {each.name: each.merged() for each in engine_weights(policy)}
    assert {name: w.shape for name, w in merged.items()} == {name: w.shape for name, w in plain.named_parameters()}
    assert [each.nbytes for each in engine_weights(policy)] == [weight.nbytes for weight in merged.values()]
    save_trained(policy, str(tmp_path), merge=True)
    saved = load(str(tmp_path))
    assert all(torch.equal(weight, merged[name]) for name, weight in saved.named_parameters())
    packed, unpacked, before = (model(IDS).logits.float() for model in (policy, saved, plain))
    assert 4 * (packed - unpacked).abs().max() < (packed - before).abs().max()


def test_a_model_without_an_adapter_is_sent_as_it_is():
    plain = tiny_qwen3(40)
    sent = {each.name: each.merged() for each in engine_weights(plain)}
    assert all(sent[name].data_ptr() == weight.data_ptr() for name, weight in plain.named_parameters())


# ---------------------------------------------------------------------------------------------------------------------
# One model for all.


@pytest.mark.parametrize("shared", [False, True])
def test_reference_and_anchor_are_no_second_models(shared):
    policy = with_adapter(tiny_qwen3(40))
    adapter = Adapter(policy)
    backend = TorchBackend(policy, PLAN, 1.0, anchor=True, reference=True, shared=shared, adapter=adapter)
    assert {id(model) for model in backend.models.values()} == {id(policy)}
    trained = {id(weight) for group in backend.optimizer.param_groups for weight in group["params"]}
    assert trained == {id(weight) for weight in adapter.parameters.values()}
    held = {name: tensor.numel() for name, tensor in backend.moving["anchor"].items()}
    assert held == {name: weight.numel() for name, weight in adapter.parameters.items()}
    assert all(".lora_" in name for name in held)
    size = sum(weight.numel() for weight in tiny_qwen3(40).parameters())
    assert sum(weight.numel() for weight in policy.parameters()) == size + sum(held.values())
    assert all(".lora_" in name for name in backend.state_dict()["policy"])


def test_log_probs_of_reference_and_anchor_are_those_of_whole_models():
    policy = with_adapter(tiny_qwen3(40))
    backend = TorchBackend(policy, PLAN, 1.0, anchor=True, reference=True, adapter=Adapter(policy))
    anchor = TorchBackend(copy.deepcopy(policy), PLAN, 1.0)
    base = TorchBackend(tiny_qwen3(40), PLAN, 1.0)
    for _ in range(3):
        backend.backward(backend.forward("policy", batch(), train=True)[0].sum())
        backend.step()
        backend.update_anchor(0.5)
        with torch.no_grad():
            for mine, policys in zip(anchor.model.parameters(), policy.parameters(), strict=True):
                mine.lerp_(policys, 0.5)
    before = values(policy)
    with torch.no_grad():
        policys = backend.forward("policy", batch())[0]
        assert torch.equal(backend.forward("anchor", batch())[0], anchor.forward("policy", batch())[0])
        assert torch.equal(backend.forward("reference", batch())[0], base.forward("policy", batch())[0])
        assert torch.equal(backend.forward("policy", batch())[0], policys)
    assert (policys - backend.forward("anchor", batch())[0]).abs().max() > 1e-2
    assert (policys - backend.forward("reference", batch())[0]).abs().max() > 1e-2
    assert same(values(policy), before)


def test_a_graph_that_is_kept_meanwhile_does_not_notice():
    policy = with_adapter(tiny_qwen3(40))
    backend = TorchBackend(policy, PLAN, 1.0, anchor=True, reference=True, adapter=Adapter(policy))
    gradients = []
    for between in (False, True):
        loss = backend.forward("policy", batch(), train=True)[0].sum()
        if between:
            with torch.no_grad():
                backend.forward("reference", batch())
                backend.forward("anchor", batch())
        backend.backward(loss)
        gradients.append({name: weight.grad.clone() for name, weight in backend.trained.items()})
        backend.optimizer.zero_grad()
    assert same(*gradients) and max(gradient.abs().max() for gradient in gradients[0].values()) > 0
    assert all(weight.grad is None for weight in policy.parameters())


def test_an_error_inside_leaves_the_policy_as_it_was():
    policy = with_adapter(tiny_qwen3(40))
    before = values(policy)
    with pytest.raises(RuntimeError), Adapter(policy).acting_as("reference", None):
        assert not same(values(policy), before)
        raise RuntimeError
    assert same(values(policy), before)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs through peft's wrapper.


@pytest.mark.parametrize("share", [False, True])
def test_blocks_and_shared_prompts_work_through_the_wrapper(share, monkeypatch):
    monkeypatch.setattr(shared_prompts, "FEWEST_SPARED", 1)
    policy = with_adapter(tiny_qwen3(40))
    assert has_plain_head(policy) and shared_prompts.can_share_prompts(policy)
    inputs = (batch().sequences, batch().attention_mask, batch().action_mask)
    got = response_log_probs(policy, *inputs, entropy=True, share_prompts=share)
    want = response_log_probs(policy, *inputs, entropy=True, blockwise=False)
    for mine, theirs in zip(got, want, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-5)
    trained = list(Adapter(policy).parameters.values())
    mine, theirs = (torch.autograd.grad(each[0].sum() + each[1].sum(), trained) for each in (got, want))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(mine, theirs, strict=True))


def test_an_adapted_output_matrix_takes_the_plain_path(tmp_path):
    policy = with_adapter(tiny_qwen3(40), ["lm_head", "q_proj"])
    assert not has_plain_head(policy)
    backend = TorchBackend(policy, PLAN, 1.0, adapter=Adapter(policy))
    got = backend.forward("policy", batch())[0]
    logits = policy(batch().sequences).logits.log_softmax(-1)[:, :-1]
    want = logits.gather(-1, batch().sequences[:, 1:, None])[..., 0] * batch().action_mask
    assert torch.allclose(got, want, atol=1e-5)
    save_trained(policy, str(tmp_path), merge=False)
    loaded = PeftModel.from_pretrained(tiny_qwen3(40), str(tmp_path))
    assert torch.equal(loaded(IDS).logits, policy(IDS).logits)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused.

LORA = ["--ds.lora.rank", "4", "--actor.adam.lr", "1e-2"]
REFUSED = {
    "--ds.lora.target_modules q_proj k_porj": "target_modules k_porj: no linear layers of .*; it has down_proj",
    "--ds.lora.target_modules embed_tokens": "embed_tokens: no linear layers of",
    "--ds.lora.target_modules self_attn": "self_attn: no linear layers of",
    "--ds.lora.target_modules": "names no layer: give some of down_proj",
    "--ds.lora.rank -1": r"--ds.lora.rank must be a number in \[0, inf\), got -1",
    "--ds.lora.alpha 0": r"--ds.lora.alpha must be a number in \(0, inf\), got 0",
    "--ds.lora.rank 0 --ds.lora.alpha 8": "--ds.lora.alpha has no effect without --ds.lora.rank: give it",
    "--ds.lora.rank 0 --ckpt.merge_lora": "--ckpt.merge_lora has no effect without --ds.lora.rank: give it",
    "--ds.lora.dropout 0.1": "--ds.lora.dropout cannot be used with --loss apo: drop it, or use --loss openrlhf",
    "--ds.load_in_4bit": "--ds.load_in_4bit needs --ds.param_dtype bf16, not fp32",
    "--ds.load_in_4bit --ds.param_dtype bf16 --ds.zero_stage 3": "--ds.load_in_4bit needs --ds.zero_stage 0, 1 or 2",
    "--ds.load_in_4bit --ds.lora.rank 0": "--ds.load_in_4bit has no effect without --ds.lora.rank: give it",
    "--apo.sync openrlhf --apo.device cuda": "--apo.sync openrlhf cannot be used with --ds.lora.rank: drop it",
    "--ds.tensor_parallel_size 2 --actor.num_gpus_per_node 2 --apo.device cuda --ds.param_dtype bf16": (
        "--ds.tensor_parallel_size cannot be used with --ds.lora.rank"
    ),
    "--loss openrlhf --train.enable_ema --apo.device cuda": "--train.enable_ema cannot be used with --ds.lora.rank",
}


@pytest.mark.parametrize("words", REFUSED)
def test_it_is_refused_in_a_line(flags, words):
    with pytest.raises(OptionError, match=REFUSED[words]) as error:
        resolve([*flags, *LORA, *words.split()])
    assert "\n" not in str(error.value)


def test_an_output_matrix_that_is_the_embedding_cannot_be_a_target(flags, tiny_model, tmp_path):
    tied = ["--actor.model_name_or_path", str(tmp_path), "--ds.lora.target_modules", "lm_head"]
    assert resolve([*flags, *LORA, "--ds.lora.target_modules", "lm_head"])
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(OptionError, match="lm_head: the model's output matrix is its embedding"):
        resolve([*flags, *LORA, *tied])


def test_all_linear_may_be_given_and_a_gpu_syncs_in_buckets(flags):
    assert resolve([*flags, *LORA, "--ds.lora.target_modules", "all-linear"]).ds.lora.target_modules == "all-linear"
    cuda = [*flags, "--apo.device", "cuda", "--ds.attn_implementation", "sdpa"]
    assert resolve([*cuda, *LORA, "--rollout.max_engine_restarts", "1"]).apo.sync == "buckets"
    assert resolve(cuda).apo.sync is None
