"""SwanLab and trackio: what they are told, and, where they are installed, what they write without a network."""

import json
import sys
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import pytest

from openrlhf_apo.data.trackers import make_trackers
from openrlhf_apo.errors import OptionError
from openrlhf_apo.options import effects, resolve, run_plan

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["swanlab", "trackio"]
SECRET = "s3cret"


def log(argv: list[str]) -> None:
    """As a run does."""
    args = resolve(argv)
    for tracker in make_trackers(run_plan(args, argv), args):
        tracker.log_train(1, {"reward_mean": 0.5, "time/step": 2.0})
        tracker.log_eval(1, {"pass1": 0.25})
        tracker.close()


@pytest.fixture
def stub(monkeypatch):
    """A module of that name, and what it is told: [function, its arguments]."""

    def make(name: str, init=None) -> list:
        told: list = []
        module = ModuleType(name)
        module.Settings = lambda **settings: SimpleNamespace(**settings)
        module.init = init or (lambda **settings: told.append(("init", settings)))
        module.log = lambda metrics, step: told.append(("log", step, metrics))
        module.finish = lambda: told.append(("finish",))
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(effects, "find_spec", lambda name: True)
        return told

    return make


@pytest.mark.parametrize("name", NAMES)
def test_numbers_go_there_by_rollout_and_settings_without_secrets(flags, stub, name):
    told = stub(name)
    reward = ["--reward.remote_url", f"http://me:{SECRET}@localhost:1/score?token={SECRET}"]
    log([*flags, *reward, f"--logger.{name}_project", "sums", "--logger.wandb.run_name", "first"])
    init, *logged = told
    assert init[1]["project"] == "sums" and init[1]["name"] == "first"
    assert init[1]["config"]["rollout.batch_size"] == 8 and SECRET not in json.dumps(init[1]["config"])
    assert logged == [
        ("log", 1, {"train/reward_mean": 0.5, "train/time/step": 2.0}),
        ("log", 1, {"eval/pass1": 0.25}),
        ("finish",),
    ]


def test_swanlab_without_a_login_is_refused_and_does_not_ask(flags, stub):
    def init(settings, **more):
        assert not settings.interactive and not settings.probe["runtime"]  # which is the command line
        raise RuntimeError("no API key was provided.\nAnd more.")

    stub("swanlab", init)
    with pytest.raises(
        OptionError, match="^--logger.swanlab_project: no API key was provided. Set SWANLAB_API_KEY, or"
    ):
        log([*flags, "--logger.swanlab_project", "sums"])


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_named_with_pips_command(flags, monkeypatch, name):
    monkeypatch.setattr(effects, "find_spec", lambda name: None)
    with pytest.raises(OptionError) as error:
        resolve([*flags, f"--logger.{name}_project", "sums"])
    assert str(error.value) == f"--logger.{name}_project needs the package {name}: pip install '{name}'"


@pytest.mark.parametrize("name", NAMES)
def test_the_real_one_writes_to_disk(flags, tmp_path, monkeypatch, name):
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: pip install -e '.[{name}]'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    log([*flags, f"--logger.{name}_project", "sums", "--logger.wandb.run_name", "first"])
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"train/reward_mean" in written and b"eval/pass1" in written
