"""Failures that users of other trainers reported: each test makes what made one there, and names its thread.
docs/known_failures.md lists them all, with those that other tests hold."""

import json
import os
import re
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from outcome import REWARD, outcome
from test_exact_resume import drop_after

from openrlhf_apo import cpu
from openrlhf_apo.cli.dry_run import _print_settings
from openrlhf_apo.cli.train_apo_ray import RESUME, resume_command
from openrlhf_apo.data.trackers import make_trackers
from openrlhf_apo.errors import RunError
from openrlhf_apo.objectives import GROUP_LOSSES, TOKEN_LOSSES
from openrlhf_apo.options import effects, owners, resolve, run_plan, start_up_warnings
from openrlhf_apo.options.manifest import manifest
from openrlhf_apo.options.openrlhf_flags import openrlhf_flag
from openrlhf_apo.options.resolve import make_parser
from openrlhf_apo.settings import settings_of
from openrlhf_apo.trainer.clock import Clock
from openrlhf_apo.trainer.handles import SamplingSettings
from openrlhf_apo.trainer.metrics import read_metrics
from openrlhf_apo.trainer.prompts import PromptRow, PromptStream
from openrlhf_apo.trainer.rollout_files import RolloutFiles
from openrlhf_apo.trainer.rollouts import EngineRollouts, GroupFilter
from openrlhf_apo.trainer.samples import Sample

pytestmark = pytest.mark.filterwarnings("ignore")


def reward_file(tmp_path: Path, expression: str) -> list[str]:
    path = tmp_path / "reward.py"
    path.write_text(f"def reward_func(queries, prompts, labels, **kwargs):\n    return {expression}\n")
    return [REWARD, str(path)]


def rows_of(out: Path) -> list[dict]:
    return read_metrics(out / "metrics.jsonl")


# ---- resume ----


def drawn(folder: Path) -> dict[int, list[tuple[int, str]]]:
    """{rollout: (group id, prompt) of its groups in order} of saved rollouts."""
    files = RolloutFiles(str(folder))
    found = {}
    for rollout in range(1, 100):
        if (folder / f"rollout_{rollout:05d}.jsonl").exists():
            found[rollout] = list(dict.fromkeys((s.group_id, s.prompt) for s in files.read(rollout)))
    return found


EPISODES = ["--train.num_episodes", "3", "--ckpt.save_steps", "1", "--ckpt.max_num", "9"]


@pytest.fixture(scope="module")
def three_episodes(short, tmp_path_factory) -> Path:
    """A run of three episodes, each of two rollouts of four prompts."""
    out = tmp_path_factory.mktemp("three_episodes")
    assert outcome(short, out, *EPISODES, "--apo.save_rollouts", str(out / "rollouts")) == (0, "")
    return out


@pytest.mark.parametrize("stopped", [1, 2, 4], ids=["in an episode", "between two", "before the last"])
def test_a_resumed_run_draws_what_is_left_and_nothing_twice(short, three_episodes, tmp_path, stopped):
    """verl #5725: resumed at the end of an epoch, a run trained nothing and ended with exit code 0. NeMo-RL #3599:
    prompts that were drawn and not trained on were skipped. open-instruct #1523: those trained on came again."""
    out = tmp_path / "resumed"
    shutil.copytree(three_episodes, out)
    drop_after(out, stopped)
    resumed = tmp_path / "rollouts"
    assert outcome(short, out, *EPISODES, RESUME, "--apo.save_rollouts", str(resumed)) == (0, "")
    before, after = drawn(three_episodes / "rollouts"), drawn(resumed)
    assert list(after) == list(range(stopped + 1, 7))
    together = [group for rollout in range(1, 7) for group in (before if rollout <= stopped else after)[rollout]]
    assert [group_id for group_id, _ in together] == list(range(24))
    for episode in range(3):
        assert len({prompt for _, prompt in together[8 * episode : 8 * (episode + 1)]}) == 8
    assert [row["step"] for row in rows_of(out)] == [1, 2, 3, 4, 5, 6]
    assert all(row["grad_norm"] > 0 for row in rows_of(out))


def test_a_resume_without_a_checkpoint_says_so(short, tmp_path, caplog):
    """open-instruct #1823: a flag to resume did nothing, and nobody was told that the run began anew."""
    assert outcome(short, tmp_path, RESUME) == (0, "")
    assert any("to resume from: starting anew" in line for line in caplog.messages)


# ---- engine and trainer ----


@pytest.mark.parametrize("temperature", ["0.6", "1.4"])
def test_log_probs_of_engine_and_trainer_agree_at_any_temperature(short, tmp_path, temperature):
    """TRL #4159: the engine's log-probs were those of temperature 1, and the first ratio of a token was 2."""
    assert outcome(short, tmp_path, "--rollout.temperature", temperature) == (0, "")
    assert all(row["rollout_mismatch"] < 1e-5 for row in rows_of(tmp_path))


def test_vllm_is_asked_for_the_log_probs_of_what_it_samples_from():
    """TRL #4163, which mended #4159."""
    from openrlhf_apo.cluster.engine import EnginePlan

    plan = EnginePlan("m", 1, 1, "bf16", 64, 0, False, False, False, 0.5, False, 1.0, False, True)
    assert plan.vllm_settings(0)["logprobs_mode"] == "processed_logprobs"


def test_a_truncated_distribution_is_warned_of_and_measured(short, tmp_path):
    """TRL #6789: with top_p below 1 the ratio holds the mass of what was cut off, and nothing said so."""
    args = resolve([*short, "--rollout.top_p", "0.7"])
    assert any(warning.startswith("--rollout.top_p below 1") for warning in start_up_warnings(args, run_plan(args)))
    assert outcome(short, tmp_path, "--rollout.top_p", "0.7") == (0, "")
    assert all(row["rollout_mismatch"] > 0.1 for row in rows_of(tmp_path))


@pytest.mark.parametrize("loss", ["grpo", "apo"])
def test_the_first_step_is_on_policy_at_any_micro_batch_size(short, tmp_path, loss):
    """verl #6280: log-probs and old log-probs of one policy, computed in micro-batches of other sizes, differed, and
    tokens were clipped in a step that is on policy."""
    found = []
    for size in ("1", "3", "8"):
        sizes = ["--train.micro_batch_size", size, "--train.batch_size", "8", "--data.max_samples", "4"]
        assert outcome(short, tmp_path / size, "--loss", loss, *sizes) == (0, "")
        (row,) = rows_of(tmp_path / size)
        assert row["inner/log_ratio_std"][0] == 0 < row["inner/log_ratio_std"][1]
        assert row.get("inner/clipped_fraction", [0])[0] == 0
        found.append(row)
    for row in found[1:]:
        assert row["inner/grad_norm"] == pytest.approx(found[0]["inner/grad_norm"], rel=1e-4)


# ---- rewards and filters ----


@pytest.mark.parametrize("isolate", [[], ["--reward.isolate"]], ids=["in_this_process", "isolated"])
def test_zero_is_a_reward_and_a_score(short, tmp_path, isolate):
    """OpenRLHF #1219: a score of 0.0 was taken for a missing one, and the reward stood in for it."""
    reward = reward_file(tmp_path, "{'rewards': [-1.0 * len(queries[0])], 'scores': [0.0]}")
    assert outcome(short, tmp_path / "scores", *reward, *isolate) == (0, "")
    assert [row["score_mean"] for row in rows_of(tmp_path / "scores")] == [0.0, 0.0]
    reward = reward_file(tmp_path, "{'rewards': [0.0]}")
    assert outcome(short, tmp_path / "rewards", *reward, *isolate) == (0, "")
    assert [(row["reward_mean"], row["reward_failures"]) for row in rows_of(tmp_path / "rewards")] == [(0.0, 0)] * 2


def group_of(rewards: list[float], scores: list[float | None] | None = None) -> list[Sample]:
    return [
        Sample(0, "", "", "", [1], [1], "", [0.0], False, reward, score)
        for reward, score in zip(rewards, scores or [None] * len(rewards), strict=True)
    ]


def test_equal_graded_rewards_inside_the_range_are_filtered():
    """OpenRLHF #1270: the filter looked at the mean alone, and kept groups of equal graded rewards."""
    keep = GroupFilter((0.0, 1.0))
    assert not keep(group_of([0.5, 0.5, 0.5])) and keep(group_of([0.5, 0.5, 0.6]))
    assert not keep(group_of([0.5, 0.5], scores=[0.4, 0.6]))  # no gradient follows from scores


def test_the_filter_does_not_see_the_length_penalty(short, tmp_path):
    """NeMo-RL #2431: wrong answers of other lengths passed the filter, for their penalties differ."""
    seen = tmp_path / "seen"
    reward = f"(open({str(seen)!r}, 'a').write(f'{{len(queries[0])}} '), {{'rewards': [0.0]}})[1]"
    lengths = ["--rollout.max_new_tokens", "40", "--reward.overlong_buffer_len", "39"]
    more = ["--loss", "dapo", "--apo.max_generations", "2", *lengths, *reward_file(tmp_path, reward)]
    assert outcome(short, tmp_path, *more) == (0, "")
    for row in rows_of(tmp_path):
        assert "reward_mean" not in row and row["filtered_groups"] == 4 * row["generations"]
    assert len(set(seen.read_text().split())) > 4  # penalties that would differ


class OneToken:
    """EngineHandle: every answer is one token."""

    def generate(self, prompts, settings, prefix=None):
        numbers = range(settings.samples_per_prompt)
        return [Sample(p.group_id, p.text, "", "", [7], [k + 1], "", [-1.0], False) for p in prompts for k in numbers]

    def begin(self, prompts, settings, prefix=None):
        return lambda: self.generate(prompts, settings, prefix)


class RewardByGroup:
    """Scorer: equal rewards in the groups of `equal`."""

    def __init__(self, equal: set[int]):
        self.equal = equal

    def score(self, samples):
        for sample in samples:
            sample.reward = float(sample.group_id not in self.equal and sample.response_ids[0] == 1)
        return samples


def filtered(count: int, equal: set[int]) -> EngineRollouts:
    prompts = PromptStream([PromptRow(f"p{i}", "") for i in range(count)], seed=0, episodes=1)
    sampling = SamplingSettings(2, 1.0, 1.0, 4, 64, 0)
    return EngineRollouts(prompts, 4, sampling, OneToken(), RewardByGroup(equal), None, GroupFilter(), 3)


def test_what_was_accepted_before_the_data_ended_is_trained_on():
    """OpenRLHF #1310: with no prompt left to replace a filtered group, the accepted ones were thrown away too."""
    source = filtered(4, equal={1})
    assert [s.group_id for s in source.sample(1, Clock())[::2]] == [0, 2, 3] and source.exhausted


def test_good_groups_that_a_rollout_has_no_room_for_are_kept_for_the_next():
    """verl #3475: dynamic sampling threw away what it had sampled beyond the batch, unseen."""
    source = filtered(12, equal={1})
    assert [s.group_id for s in source.sample(1, Clock())[::2]] == [0, 2, 3, 4]
    assert source.metrics == {"generations": 2, "filtered_groups": 1, "stale_groups": 0, "surplus_groups": 3}
    assert [s.group_id for s in source.sample(2, Clock())[::2]] == [8, 5, 6, 7]


# ---- waiting ----


def test_what_is_waited_for_is_named_and_not_for_ever(monkeypatch, caplog):
    """verl #7155: the trainer waited for ever for one lost sample, and no line said for which."""
    from openrlhf_apo.cluster import calls

    clock = [0.0]

    def wait(pending, timeout):
        clock[0] += timeout
        return [ref for ref in pending if ref != "lost"], [ref for ref in pending if ref == "lost"]

    monkeypatch.setattr(calls, "_ask_for_head", lambda: None)
    monkeypatch.setattr(calls.ray, "wait", wait)
    monkeypatch.setattr(calls.ray, "get", lambda ref: ref)
    monkeypatch.setattr(calls.time, "monotonic", lambda: clock[0])
    with pytest.raises(RunError, match=r"^sampling gave no answer within 500 s; raise --apo.timeout"):
        calls.get_all(["first", "lost"], 500.0, "sampling")
    assert "sampling: nothing from actor 1 of 2 for 240 s" in caplog.text


# ---- settings, and secrets among them ----


@pytest.mark.parametrize("address", ["auto", None], ids=["cluster", "here"])
def test_ray_is_handed_a_few_variables_and_no_folder(monkeypatch, address):
    """NeMo-RL #309: all of os.environ was put in Ray's runtime_env, whose agent did not start. lmm-r1 #66: the working
    directory was too large for it."""
    from openrlhf_apo.cluster import start
    from openrlhf_apo.trainer.placement import Placement

    environment = {"PATH": "/bin", "WANDB_API_KEY": "s3cret", "BASH_FUNC_x": "() { :; }"}
    monkeypatch.setattr(os, "environ", environment | ({"RAY_ADDRESS": address} if address else {}))
    cpu.decide("cpu")
    seen = {}
    monkeypatch.setattr(start.ray, "init", lambda **settings: seen.update(settings))
    monkeypatch.setattr(start.ray, "cluster_resources", lambda: {"GPU": 9})
    monkeypatch.setattr(start.patches, "keep_ray_on_loopback", lambda: None)
    start.start_ray(
        SimpleNamespace(
            actor=SimpleNamespace(num_nodes=1, num_gpus_per_node=1), logger=SimpleNamespace(actor_logs=False)
        ),
        Placement(1, 1, 0, 0),
    )
    if address is None:
        assert "runtime_env" not in seen
        return
    assert set(seen["runtime_env"]) == {"env_vars"}
    given = seen["runtime_env"]["env_vars"]
    assert not {"WANDB_API_KEY", "BASH_FUNC_x"} & set(given) and 3 < len(given) < 15


@pytest.fixture
def wandb(monkeypatch) -> dict:
    """What a wandb that is not logged in is told."""
    told: dict = {}
    module = ModuleType("wandb")
    module.api = SimpleNamespace(api_key=None)
    module.Table = lambda columns: None
    module.define_metric = lambda *arguments, **settings: None

    def login(key):
        told["key"] = module.api.api_key = key

    def init(**settings):
        told.update(settings | {"command": sys.argv})

    module.login, module.init = login, init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr(effects, "find_spec", lambda name: True)
    return told


SECRET = "s3cret"


def test_a_key_reaches_wandbs_login_and_nothing_that_is_kept(short, wandb, capsys, monkeypatch):
    """OpenRLHF 0.11.2: its logger hands wandb all settings, the key among them, and wandb shows them as the run's.
    Here the key stands neither there nor in the log, a dry run or a checkpoint."""
    argv = [*short, "--logger.wandb.key", SECRET]
    args = resolve(argv)
    monkeypatch.setattr(sys, "argv", ["train_apo_ray", *argv])
    make_trackers(run_plan(args), args)
    assert SECRET not in str(wandb["command"]) and "$WANDB_API_KEY" in wandb["command"]
    assert wandb["key"] == SECRET and SECRET not in str(wandb["config"]) and "wandb" in str(wandb["config"])
    assert args.logger.wandb.key == SECRET  # as it was
    _print_settings(args)
    assert "logger.wandb.key: (not shown)" in capsys.readouterr().out
    server = resolve([*argv, REWARD, f"http://user:{SECRET}@localhost:1/score"])  # an address may hold one too
    assert SECRET not in json.dumps([manifest(args), manifest(server)])
    for given in (argv, [*short, f"--logger.wandb.key={SECRET}"]):
        command = resume_command(given)
        assert SECRET not in command and command.endswith(f'"$WANDB_API_KEY" {RESUME}')
        assert len(shlex.split(command)) == len(given) + 4


def test_no_loss_has_an_entropy_bonus_and_no_engine_sleeps_unless_asked(short):
    """verl #781: an entropy coefficient of 0.001, by default, made the entropy explode. vime #442: putting a small
    model to sleep, by default, was most of a step's time."""
    for loss in [*GROUP_LOSSES, *TOKEN_LOSSES]:
        args = resolve([*short, "--loss", loss])
        assert args.actor.entropy_coef is None and not args.vllm.enable_sleep
        assert run_plan(args).regularizer.entropy is None


# What is read by a part of its own, under another name: what to look for in OpenRLHF's source.
READ_AS = {"actor.muon.lr": r"vars\(args\.actor\.muon\)", "actor.muon.momentum": r"vars\(args\.actor\.muon\)"}
TABLES = (
    "flags.py",
    "openrlhf_flags.py",
    "conditions.py",
    "check_cluster.py",
    "checks.py",
    "effects.py",
    "manifest.py",
)


def test_every_flag_is_read():
    """open-instruct #1823: a flag was declared, accepted and never read. A setting of a loss, a controller or another
    owner is read by its class; any other flag by this package's code or by OpenRLHF's, beside tables and checks."""

    def sources(package: str, but: tuple[str, ...]) -> str:
        root = Path(find_spec(package).origin).parent
        return "\n".join(path.read_text() for path in root.rglob("*.py") if path.name not in but)

    text = sources("openrlhf_apo", TABLES) + sources("openrlhf", ("train_ppo_ray.py",))
    owned = {}
    for owner in owners.owners():
        classes = [cls for cls in owner.cls.__mro__ if cls.__module__.startswith("openrlhf_apo")]
        source = "".join(Path(sys.modules[cls.__module__].__file__).read_text() for cls in classes)
        for each in settings_of(owner.cls):
            read = f".{each.name}" in source or f"plan.{owner.prefix}.{each.name}" in text
            owned.setdefault(owner.flag(each), []).append(read)
    unread, looked_at = [], 0
    for action in make_parser()._actions:
        flag = action.dest
        known = openrlhf_flag(flag)
        if flag == "help" or (known and all(known.use(k).kind == "refused" for k in ("group", "token", "openrlhf"))):
            continue
        looked_at += 1
        group, _, name = flag.rpartition(".")
        inside = rf"\.{re.escape(group)}, \"{name}\"" if group else r"(?!)"
        pattern = READ_AS.get(flag, rf"args\.{re.escape(flag)}\b|\"{re.escape(flag)}\"|{inside}")
        if not (all(owned[flag]) if flag in owned else re.search(pattern, text)):
            unread.append(flag)
    assert unread == [] and looked_at > 150
    assert not re.search(r"args\.apo\.never_read\b", text)  # it can fail
