"""TRL's side of laptop.py, which runs it in TRL's own environment: GRPO on the work of workload.py.

    .cache/trl/bin/python benchmarks/trl_worker.py --help

Writes metrics.jsonl with the keys of this project's: of each step, whole and generation, seconds.
"""

import argparse
import json
import runpy
import time
from pathlib import Path


def train(args: argparse.Namespace) -> None:
    import torch
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    reward_func = runpy.run_path(args.reward)["reward_func"]
    lengths: list[int] = []  # of the last rollout's answers
    seconds = {"generate": 0.0, "rollout": 0.0}

    def reward(prompts, completions, completion_ids, **kwargs) -> list[float]:
        lengths[:] = map(len, completion_ids)
        queries = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return reward_func(queries, prompts, None)["rewards"].tolist()

    class TimedTrainer(GRPOTrainer):
        def _generate(self, *arguments):
            start = time.perf_counter()
            result = super()._generate(*arguments)
            seconds["generate"] = time.perf_counter() - start
            return result

        def _generate_and_score_completions(self, inputs):
            start = time.perf_counter()
            result = super()._generate_and_score_completions(inputs)
            seconds["rollout"] = time.perf_counter() - start
            return result

    class WriteSteps(TrainerCallback):
        def on_train_begin(self, *_, **__):
            self.last = time.perf_counter()

        def on_step_end(self, arguments, state, *_, **__):
            now = time.perf_counter()
            row = {"step": state.global_step, "time/step": now - self.last, "time/generate": seconds["generate"]}
            row |= {"time/update": row["time/step"] - seconds["rollout"]}
            row |= {"response_length": sum(lengths) / len(lengths)}
            with open(Path(args.out) / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            self.last = now

    answers = args.per_rollout * args.group
    config = GRPOConfig(
        output_dir=args.out,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,
        per_device_train_batch_size=args.micro_batch,
        gradient_accumulation_steps=answers // args.micro_batch,
        num_generations=args.group,
        max_completion_length=args.response_tokens,
        max_steps=args.steps,
        learning_rate=1e-5,
        beta=0.0,
        optim="adamw_torch_fused",
        logging_steps=1,  # as this project's metrics.jsonl
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    TimedTrainer(
        model=args.model,
        reward_funcs=reward,
        args=config,
        train_dataset=load_dataset("json", data_files=args.prompts, split="train"),
        callbacks=[WriteSteps()],
    ).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "prompts", "reward", "out"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("per_rollout", "group", "response_tokens", "micro_batch", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
