"""The file of a comparison: read, checked, and turned into runs. docs/compare.md describes its keys."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import yaml

from openrlhf_apo.analysis.compare_runs import Run
from openrlhf_apo.errors import CompareError, OptionError
from openrlhf_apo.options import resolve, run_plan, start_up_warnings
from openrlhf_apo.options.resolve import flatten

KEYS = ("output_dir", "seeds", "config", "flags", "arms", "prepare", "threshold", "baseline", "jobs")
OWN_FLAGS = ("train.seed", "ckpt.output_dir", "ckpt.path", "ckpt.load_enable", "config", "dry_run")


@dataclass(frozen=True)
class Comparison:
    """What a comparison file says.

    `arms` holds the trainer's command line of each arm, as words, without the seed and the directories. `prepare`
    holds commands, each as words.
    """

    output_dir: Path
    seeds: list[int]
    arms: dict[str, list[str]]
    prepare: list[list[str]]
    threshold: float | None
    baseline: str | None
    jobs: int

    def runs(self) -> list[Run]:
        """Seed by seed, so that every arm has a run early."""
        return [Run(self.output_dir, arm, seed, words) for seed in self.seeds for arm, words in self.arms.items()]


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise CompareError(f"{twice[0]!r} comes twice (line {node.start_mark.line + 1} and below): rename one")
        return super().construct_mapping(node, deep)


def load_comparison(path) -> Comparison:
    """Read a comparison file. Raises CompareError when it cannot be used. The flags of arms: see `check_arms`."""
    content = _read_yaml(path)
    if unknown := content.keys() - set(KEYS):
        raise CompareError(f"unknown key {sorted(map(str, unknown))[0]!r}; known are {', '.join(KEYS)}")
    seeds, arms = content.get("seeds"), content.get("arms")
    if not isinstance(content.get("output_dir"), str):
        raise CompareError("output_dir is missing: the folder for runs and results")
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise CompareError("seeds must be a list of integers, such as [1, 2, 3]")
    if len(set(seeds)) < len(seeds):
        raise CompareError(f"seeds {seeds}: one comes twice")
    if not isinstance(arms, dict) or not arms:
        raise CompareError("arms is missing: `name: {flag: value}` for each")
    for arm in arms:
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", str(arm), re.ASCII):
            raise CompareError(f"arm {arm!r}: its name is a folder's: use letters, digits, _ and -")
    threshold, jobs = content.get("threshold"), content.get("jobs", 1)
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, int | float)):
        raise CompareError(f"threshold {threshold!r}: must be a reward, such as 0.65")
    if type(jobs) is not int or jobs < 1:
        raise CompareError(f"jobs {jobs!r}: must be an integer above 0")
    baseline = content.get("baseline")
    if baseline is not None and baseline not in arms:
        raise CompareError(f"baseline {baseline!r}: no such arm; choose one of {', '.join(map(str, arms))}")
    prepare = content.get("prepare") or []
    if not isinstance(prepare, list) or not all(isinstance(command, str | list) and command for command in prepare):
        raise CompareError("prepare must be a list of commands, each a string or a list of words")

    configs = content.get("config") or []
    configs = [configs] if isinstance(configs, str) else configs
    if not isinstance(configs, list) or not all(isinstance(path, str) for path in configs):
        raise CompareError("config must be a file of the trainer, or a list of them")
    base: dict = {}
    for path in configs:
        base |= flatten(_read_yaml(path))
    common = {name: value for name, value in base.items() if name not in OWN_FLAGS}
    common |= _flags(content.get("flags"), "flags")
    return Comparison(
        output_dir=Path(content["output_dir"]),
        seeds=seeds,
        arms={str(arm): _words(common | _flags(flags, f"arm {arm}")) for arm, flags in arms.items()},
        prepare=[
            shlex.split(command) if isinstance(command, str) else [str(word) for word in command]
            for command in prepare
        ],
        threshold=threshold,
        baseline=baseline,
        jobs=jobs,
    )


def _read_yaml(path) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.load(file, _Loader)
    except CompareError as error:
        raise CompareError(f"{path}: {error}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CompareError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise CompareError(f"{path}: expected `key: value` lines")
    return content


def _flags(tree, where: str) -> dict:
    """{flag: value} of a dotted or nested mapping; `where` it stands in the file."""
    if not isinstance(tree or {}, dict):
        raise CompareError(f"{where}: expected `flag: value` lines")
    flat = flatten(tree or {})
    for name in OWN_FLAGS:
        if name in flat:
            raise CompareError(f"{where}: {name} is set by compare itself: drop it")
    return flat


def _words(flags: dict) -> list[str]:
    """The command line of {flag: value}; null leaves out what `config` or `flags` set."""
    words = []
    for name, value in flags.items():
        if value is not None:
            values = [] if value is True else ["false"] if value is False else value
            values = values if isinstance(values, list) else [values]
            words += [f"--{name}", *map(str, values)]
    return words


def check_arms(comparison: Comparison, check_model: bool) -> list[str]:
    """Resolve every arm's flags as the trainer will; returns the warnings. CompareError names the arm that cannot run.

    `check_model=False` does not look at the model, which `prepare` may have yet to make.
    """
    warnings = []
    for run in comparison.runs()[: len(comparison.arms)]:  # the first seed's: others differ only in the seed
        try:
            settings = resolve(run.argv, check_model)
            plan = run_plan(settings)
        except OptionError as error:
            raise CompareError(f"arm {run.arm}: {error}") from None
        warnings += [f"arm {run.arm}: {warning}" for warning in start_up_warnings(settings, plan)]
    return warnings
