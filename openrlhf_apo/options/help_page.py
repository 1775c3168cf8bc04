"""--help: the flags that most runs need, on one page. `--help all` is every flag, with its default."""

import argparse
import sys

PAGE = {
    "What is trained, and on what": {
        "actor.model_name_or_path": "a Hugging Face folder or name",
        "data.prompt_dataset": "a JSONL file, a folder or a name; several, comma-separated",
        "data.input_key": "the column with the prompt",
        "data.label_key": "the column with the answer",
        "data.apply_chat_template": "wrap prompts in the model's chat template",
        "data.max_len": "tokens of prompt and answer together",
        "data.max_samples": "only the first rows (default all)",
        "reward": "math_verify, FILE.py or URL; several are added up",
        "train.agent_func_path": "FILE.py with an AgentExecutor: conversations, and their rewards",
    },
    "How": {
        "loss": "the objective, docs/algorithms.md; openrlhf is OpenRLHF's own step (default apo)",
        "loss_path": "a file with a loss of your own, docs/own_loss.md",
        "alpha_mode": "fixed, guarded or ess",
        "apo.alpha": "of fixed (default 0.6)",
        "apo.beta_r": "temperature of the target (default 1.0)",
        "apo.tau_anc": "temperature of the policy's side (default 0.8)",
        "apo.anchor": "rollout, lagged, ema or reference (default rollout)",
        "algo.kl.init_coef": "KL to the model at the start (default by loss)",
        "actor.adam.lr": "learning rate",
        "actor.lr_scheduler": "its schedule",
    },
    "How much": {
        "rollout.batch_size": "prompts of a rollout",
        "rollout.n_samples_per_prompt": "answers to each, P (default 8)",
        "rollout.max_new_tokens": "tokens of an answer, at most",
        "rollout.temperature": "of sampling",
        "train.batch_size": "answers of an optimizer step",
        "train.max_tokens_per_gpu": "tokens of a micro-batch, at most (default 16192, 4096 on a CPU)",
        "train.num_episodes": "passes over the prompts",
        "train.seed": "of everything",
    },
    "What is left": {
        "ckpt.output_dir": "the trained model, metrics.jsonl, run.json",
        "ckpt.save_steps": "rollouts between checkpoints; -1: none",
        "ckpt.load_enable": "go on from the newest checkpoint",
        "eval.dataset": "held-out prompts",
        "eval.steps": "rollouts between evaluations; -1: none",
        "eval.ends": "evaluate before and after training",
        "apo.save_rollouts": "write every scored sample there",
    },
    "Where": {
        "runtime": "embedded: one process; ray: Ray, DeepSpeed, vLLM; auto",
        "actor.num_gpus_per_node": "ranks of the policy (default 8, 1 without CUDA)",
        "vllm.num_engines": "engines that sample",
        "ds.zero_stage": "0 to 3",
        "config": "YAML files with any of these flags; a later one wins, and the command line over all",
        "dry_run": "check everything, print the settings, stop",
    },
}


class HelpAction(argparse.Action):
    """--help and --help all."""

    def __call__(self, parser, namespace, values, option_string=None):
        if values == "all":
            for action in parser._actions:
                if action.default not in (None, False, argparse.SUPPRESS) and "default" not in (action.help or ""):
                    default = str(action.default).replace("%", "%%")
                    action.help = f"{action.help or ''} (default {default})".lstrip()
            parser.print_help()
        else:
            parser._print_message(help_page(parser), sys.stdout)
        parser.exit()


def help_page(parser: argparse.ArgumentParser) -> str:
    actions = {option.removeprefix("--"): action for action in parser._actions for option in action.option_strings}
    lines = [f"usage: {parser.prog} [flags]"]
    for title, rows in PAGE.items():
        lines += ["", title]
        for flag, text in rows.items():
            default = actions[flag].default
            shown = "" if "(default" in text or default in (None, False, "") else f" (default {default})"
            lines.append(f"  --{flag:<29} {text}{shown}")
    return "\n".join(
        [
            *lines,
            "",
            "A switch takes false, too.",
            "--help all: every flag. docs/openrlhf_flags.md: what OpenRLHF's flags do here.",
            "",
        ]
    )
