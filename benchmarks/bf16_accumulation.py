"""What adding up micro-batches in bf16 does to a step's gradient, by ZeRO stage and --ds.grad_accum_dtype.

    .venv/bin/python benchmarks/bf16_accumulation.py

Real DeepSpeed on a CPU, one process: 64 samples with coefficients of both signs, cut into 1, 4, 16 and 64
micro-batches. Two relative errors of the accumulated gradient: against the float64 sum of the gradients that the same
engine gives for each micro-batch alone, which is what accumulation adds; and against the fp32 gradient of the same
weights, which is everything that bf16 does. docs/gpu.md has the numbers and what follows. Two minutes on one core.
"""

import argparse
import contextlib
import itertools
import json
import logging
import os
import socket
import sys
import tempfile
import warnings
from types import SimpleNamespace

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from openrlhf_apo.ranks.deepspeed.backend import Actor  # OpenRLHF's; importing it from here prepares this process
from openrlhf_apo.ranks.deepspeed.strategy import ApoStrategy, RankPlan

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same numbers on every machine

SAMPLES, TOKENS, VOCABULARY = 64, 32, 512
MICRO_BATCHES = (1, 4, 16, 64)
CONFIGURATIONS = [(0, None), (1, None), (1, "fp32"), (2, None), (2, "fp32"), (3, None), (3, "fp32")]


def make_model(path: str) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **shape, **heads))
    model.bfloat16().save_pretrained(path)  # the fp32 reference loads the rounded weights


def micro_batch_losses(actor: Actor, count: int):
    """Σ_i c_i ℓ_i of each of `count` micro-batches, as a group objective makes it: c sums to 0 in groups of 8."""
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(VOCABULARY, (SAMPLES, TOKENS), generator=generator)
    coefficients = torch.randn(SAMPLES // 8, 8, generator=generator)
    coefficients = (coefficients - coefficients.mean(-1, keepdim=True)).flatten()
    for rows in torch.arange(SAMPLES).chunk(count):
        mask = torch.ones(len(rows), TOKENS - 1)
        log_probs = actor(sequences[rows], mask, torch.ones(len(rows), TOKENS, dtype=torch.long))  # [B, T-1]
        yield (coefficients[rows] * log_probs.sum(-1)).sum()


def fp32_gradient(path: str) -> Tensor:
    actor = Actor(path, attn_implementation="sdpa", param_dtype="fp32")
    (loss,) = micro_batch_losses(actor, 1)
    loss.backward()
    return torch.cat([p.grad.double().flatten() for p in actor.parameters()])


class Engine:
    """DeepSpeed as a run makes it, with a learning rate of 0 and Adam's β1 = 0: its exp_avg is the gradient."""

    def __init__(self, path: str, stage: int, accumulation: str | None):
        args = SimpleNamespace(
            local_rank=-1,
            train=SimpleNamespace(seed=0, full_determinism_enable=False, micro_batch_size=1, batch_size=SAMPLES),
            actor=SimpleNamespace(max_norm=0.0),
            ds=SimpleNamespace(
                zero_stage=stage, param_dtype="bf16", grad_accum_dtype=accumulation, enable_sleep=False
            ),
        )
        self.strategy = ApoStrategy(args, RankPlan())
        self.strategy.setup_distributed()
        actor = Actor(
            path, attn_implementation="sdpa", param_dtype="bf16", ds_config=self.strategy.get_ds_train_config()
        )
        optimizer = {
            "optim": "adam",
            "adam": {"lr": 0.0, "betas": (0.0, 0.95), "eps": 1e-8, "weight_decay": 0.0},
            "lr_scheduler": "constant",
            "max_norm": 0.0,
            "scheduler_steps": 100,
        }
        self.actor, _, _ = self.strategy.prepare((actor, optimizer))

    def accumulated(self, count: int) -> Tensor:
        """The gradient of one step over all micro-batches."""
        for loss in micro_batch_losses(self.actor, count):
            self.strategy.backward(loss, self.actor, None)
        return self._step()

    def summed(self, count: int) -> Tensor:
        """The sum of the gradients of a step for each micro-batch."""
        total = 0
        for loss in micro_batch_losses(self.actor, count):
            self.strategy.backward(loss, self.actor, None)
            total = total + self._step()
        return total

    def _step(self) -> Tensor:
        """Gradient of all parameters, float64."""
        self.strategy.optimizer_step(None, self.actor, None)
        engine = self.actor.model
        if engine.zero_optimization_stage() == 0:
            optimizer = engine.optimizer  # FP16_UnfusedOptimizer, whatever the dtype
            masters = zip(
                itertools.chain(*optimizer.fp16_groups), itertools.chain(*optimizer.fp32_groups), strict=True
            )
            states = {parameter: optimizer.optimizer.state[master]["exp_avg"] for parameter, master in masters}
            parts = [states[parameter] for parameter in engine.module.parameters()]
        else:
            if engine.zero_optimization_stage() < 3:  # linked before the first step had made the states
                engine.optimizer._hp_optimizer_states_linked = False
                engine.optimizer._lazy_init_hp_params_optimizer_state()
            from deepspeed.utils import safe_get_full_optimizer_state

            parts = [safe_get_full_optimizer_state(p, "exp_avg") for p in engine.module.parameters()]
        return torch.cat([part.double().flatten() for part in parts])


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def measure() -> list[dict]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    os.environ["LOCAL_RANK"] = "0"
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    rows = []
    with tempfile.TemporaryDirectory() as path:
        make_model(path)
        exact = fp32_gradient(path)
        for stage, accumulation in CONFIGURATIONS:
            engine = Engine(path, stage, accumulation)
            for count in MICRO_BATCHES:
                gradient, summed = engine.accumulated(count), engine.summed(count)
                row = {"zero_stage": stage, "grad_accum_dtype": accumulation, "micro_batches": count}
                row["optimizer"] = type(engine.actor.model.optimizer).__name__
                row["accumulation_error"] = relative_error(gradient, summed)
                rows.append(row | {"error": relative_error(gradient, exact)})
    return rows


def print_table(rows: list[dict]) -> None:
    print("relative error of the gradient: accumulation alone / all of bf16, by number of micro-batches\n")
    print("| ZeRO | --ds.grad_accum_dtype | " + " | ".join(map(str, MICRO_BATCHES)) + " |")
    print("| --- | --- |" + " ---: |" * len(MICRO_BATCHES))
    for (stage, accumulation), group in itertools.groupby(
        rows, lambda row: (row["zero_stage"], row["grad_accum_dtype"])
    ):
        cells = [f"{row['accumulation_error']:.2%} / {row['error']:.2%}" for row in group]
        print(f"| {stage} | {accumulation or 'unset'} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("DeepSpeed").setLevel("ERROR")
    with contextlib.redirect_stdout(sys.stderr):  # what DeepSpeed and OpenRLHF print
        rows = measure()
    print_table(rows)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
