r"""Evaluate a model on a data set: its greedy score and, with --samples, pass@k.

    python -m openrlhf_apo.cli.evaluate MODEL DATA.jsonl --reward math_verify \
        [--samples K [--temperature T]] [--limit N] [--json FILE]

MODEL is a Hugging Face folder, such as the --ckpt.output_dir of a run. Everything else that says how answers are made
and scored is a flag of the trainer, with the trainer's defaults: --reward math_verify or FILE.py, --data.max_len,
--rollout.max_new_tokens, --data.input_key, --data.label_key, --data.apply_chat_template, --train.seed; or --config
FILE of a run, of which only such flags are taken. docs/evaluate.md says what the numbers are.

Exit code 2: a setting or the data cannot be used; 1: answers could not be sampled or scored.
"""

import argparse
import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, replace

from openrlhf_apo.analysis.scores import Score, pass_at_k, powers_up_to, scores, table
from openrlhf_apo.cli.console import Parser, exit_code
from openrlhf_apo.errors import OptionError, RunError
from openrlhf_apo.imports import quick_imports

# Of a run's --config; what else stands there is about training.
FROM_FILES = frozenset(
    "data.input_key data.label_key data.input_template data.apply_chat_template data.prompt_split data.max_len "
    "data.disable_fast_tokenizer rollout.max_new_tokens rollout.top_p reward.name reward.remote_url reward.weights "
    "reward.model_name_or_path reward.timeout reward.isolate reward.max_failures train.agent_func_path train.seed "
    "actor.trust_remote_code apo.device use_ms".split()
)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m openrlhf_apo.cli.evaluate",
        description="Greedy score and pass@k of a model on a data set, in this process.",
        epilog="How answers are made and scored is said by flags of the trainer, such as --reward math_verify or "
        "FILE.py, --data.max_len, --rollout.max_new_tokens, --data.input_key, --data.label_key, "
        "--data.apply_chat_template, --train.seed, or --config FILE of a run, of which these alone are taken.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face folder, such as --ckpt.output_dir of a run")
    parser.add_argument("data", metavar="DATA", help="JSONL data set, as --data.prompt_dataset takes it")
    parser.add_argument("--samples", type=int, metavar="K", help="answers per prompt for pass@1 to pass@K")
    parser.add_argument("--temperature", type=float, metavar="T", help="of these answers (default 1.0)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N prompts only")
    parser.add_argument("--json", metavar="FILE", help="write the scores there, too")
    words = sys.argv[1:] if argv is None else argv
    own, flags = parser.parse_known_args(words)
    if any(word.startswith("-") for word in words[:2]):  # the value of a trainer's flag would be taken for MODEL
        parser.error("MODEL and DATA come first")
    try:
        found = _evaluate(own, flags)
        print(table(found))
        if own.json:
            settings = {key: value for key, value in vars(own).items() if key != "json"}
            with open(own.json, "w", encoding="utf-8") as file:
                json.dump(settings | {"flags": flags, "scores": list(map(asdict, found))}, file, indent=1)
            print(f"written: {own.json}")
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:  # ours, and what the libraries say of a model or a template
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _evaluate(own: argparse.Namespace, flags: list[str]) -> list[Score]:
    if own.temperature is not None and own.samples is None:
        raise OptionError("--temperature has no effect without --samples: the greedy answer has none")
    for name in ("samples", "temperature", "limit"):
        value = getattr(own, name)
        if value is not None and not 0 < value < float("inf"):
            raise OptionError(f"--{name} {value}: must be above 0")
    if own.samples is not None and own.temperature is None:
        own.temperature = 1.0
    if own.json and not os.path.isdir(os.path.dirname(os.path.abspath(own.json))):
        raise OptionError(f"--json {own.json}: no such folder")
    with quick_imports():
        from openrlhf_apo.options import resolve, run_plan
    given = [
        *flags,
        *("--runtime", "embedded", "--actor.model_name_or_path", own.model, "--data.prompt_dataset", own.data),
        # No training comes of it, and one prompt is enough.
        *("--rollout.batch_size", "1", "--rollout.n_samples_per_prompt", "8", "--train.batch_size", "8"),
        *(("--data.max_samples", str(own.limit)) if own.limit else ()),
    ]
    args = resolve(given, from_files=FROM_FILES)
    plan = run_plan(args)
    if plan.saved_rollouts:
        raise OptionError("--apo.load_rollouts has no effect here: drop it")
    plan = replace(plan, evaluation=None, guidance=None)
    with quick_imports():
        from openrlhf_apo.embedded.evaluate import evaluate  # imports transformers
    with redirect_stdout(sys.stderr):  # what libraries and the reward print
        greedy, sampled = evaluate(plan, args, own.samples, own.temperature, sys.stderr)
    return _scores(greedy, sampled, own.samples)


def _scores(greedy: list, sampled: list, samples: int | None) -> list[Score]:
    sources = [group[0].datasource for group in greedy]
    found = scores("greedy", [group[0].score_or_reward for group in greedy], sources)
    sources = [group[0].datasource for group in sampled]
    passes = all(sample.score_or_reward in (0, 1) for group in sampled for sample in group)
    for k in powers_up_to(samples) if samples else ():
        values = [pass_at_k([sample.score_or_reward for sample in group], k) for group in sampled]
        found += scores(f"pass@{k}" if passes else f"best of {k}", values, sources)
    return found


if __name__ == "__main__":
    code = exit_code(main)
    sys.stderr.flush()
    os._exit(code)  # the thread of a hung reward function would keep the interpreter waiting for ever
