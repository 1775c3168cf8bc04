"""Rewards that go wrong: the run stops with the sample named, or drops its whole group within the budget."""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from outcome import REWARD, outcome

from openrlhf_apo.trainer.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore")

VALUES = {
    "raises": ("1 / 0", "raised ZeroDivisionError: division by zero"),
    "none": ("None", "returned None instead of"),
    "no_rewards": ("{'rewards': None}", "instead of {'rewards': ...}"),
    "nan": ("{'rewards': [float('nan')]}", "is nan"),
    "inf": ("{'rewards': [float('inf')]}", "is inf"),
    "minus_inf": ("{'rewards': [float('-inf')]}", "is -inf"),
    "word": ("{'rewards': ['good']}", "could not convert string to float"),
    "too_many": ("{'rewards': [1.0, 2.0]}", "returned 2 rewards for 1 sample"),
    "too_few": ("{'rewards': []}", "returned 0 rewards for 1 sample"),
    "list": ("[1.0]", "instead of {'rewards': ...}"),
    "hangs": ("__import__('time').sleep(20)", "took more than 1 s"),
}
DEADLY = {
    "ends_its_process": ("__import__('os')._exit(3)", "ended its process"),
    "kills_its_process": ("__import__('os').kill(__import__('os').getpid(), 9)", "ended its process"),
    "leaks_memory": ("bytearray(2**33)", "ended its process"),
    "blocks_signals": (
        "(__import__('signal').pthread_sigmask(0, range(1, 65)), __import__('time').sleep(600))",
        "took more than 1 s",
    ),
    "hangs_in_c": ("sum(range(10**15))", "took more than 1 s"),
    "prints_for_ever": ("[print('x' * 10**6) for _ in iter(int, 1)]", "took more than 1 s"),
}


def reward_file(tmp_path, expression: str) -> str:
    path = tmp_path / "reward.py"
    path.write_text(f"def reward_func(queries, prompts, labels, **kwargs):\n    return {expression}\n")
    return str(path)


def failing_file(tmp_path, expression: str) -> str:
    """Right for the trial before the run, whose answer is the label."""
    return reward_file(tmp_path, f"{{'rewards': [0.0]}} if queries[0] == prompts[0] + labels[0] else {expression}")


@pytest.mark.parametrize("isolate", [[], ["--reward.isolate"]], ids=["in_this_process", "isolated"])
@pytest.mark.parametrize("fault", VALUES)
def test_a_wrong_value_stops_the_run_with_the_sample_named(short, tmp_path, fault, isolate):
    expression, reason = VALUES[fault]
    where = [REWARD, failing_file(tmp_path, expression), "--reward.timeout", "1", *isolate]
    start = time.monotonic()
    code, error = outcome(short, tmp_path / "out", *where)
    assert code == 1 and reason in error and "label '" in error, error
    assert time.monotonic() - start < 20  # also where all hang: the first failure decides


@pytest.mark.parametrize("fault", DEADLY)
def test_what_kills_its_process_costs_an_isolated_reward_its_sample_only(short, tmp_path, fault):
    expression, reason = DEADLY[fault]
    where = [REWARD, failing_file(tmp_path, expression), "--reward.timeout", "1", "--reward.isolate"]
    code, error = outcome(short, tmp_path / "out", *where)
    assert code == 1 and reason in error, error


@pytest.mark.parametrize("isolate", [[], ["--reward.isolate"]], ids=["in_this_process", "isolated"])
def test_a_file_that_fails_for_the_first_row_is_refused_before_the_run(short, tmp_path, isolate):
    where = [REWARD, reward_file(tmp_path, "1 / 0"), *isolate]
    code, error = outcome(short, tmp_path / "out", *where)
    assert code == 2 and "for the first row the reward raised ZeroDivisionError" in error, error
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    assert outcome(short, tmp_path / "out", *where, "--reward.max_failures", "1")[0] == 1  # the run's budget decides


def test_within_the_budget_the_whole_group_of_a_failure_is_dropped_and_counted(short, tmp_path):
    expression = "{'rewards': [float(len(queries[0]))]} if labels[0] != '0' else 1 / 0"  # the label of one prompt
    where = [REWARD, reward_file(tmp_path, expression), "--reward.max_failures", "4", "--reward.isolate"]
    code, error = outcome(short, tmp_path / "out", *where)
    assert code == 0, error
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["reward_failures"] == 4


def test_an_isolated_reward_sees_no_secret_of_the_run(short, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x")
    monkeypatch.setenv("HF_TOKEN", "x")
    seen = tmp_path / "seen"
    expression = (
        f"(open({str(seen)!r}, 'w').write(' '.join(__import__('os').environ)), {{'rewards': [len(queries[0])]}})[1]"
    )
    code, error = outcome(short, tmp_path / "out", REWARD, reward_file(tmp_path, expression), "--reward.isolate")
    assert code == 0, error
    names = seen.read_text().split()
    assert "PATH" in names and not {"WANDB_API_KEY", "HF_TOKEN"} & set(names)


def test_a_file_that_cannot_be_loaded_is_refused_before_the_run(short, tmp_path):
    path = tmp_path / "reward.py"
    for content, reason in (("import nowhere_at_all", "nowhere_at_all"), ("x = 1", "reward_func")):
        path.write_text(content)
        for isolate in ([], ["--reward.isolate"]):
            code, error = outcome(short, tmp_path / "out", REWARD, str(path), *isolate)
            assert code == 2 and "cannot be loaded" in error and reason in error, error


class Handler(http.server.BaseHTTPRequestHandler):
    fault = ""

    def do_POST(self):
        if self.fault == "slow":
            time.sleep(30)
        body = {"malformed": b"{not json", "wrong": b'{"reward": 1}'}.get(
            self.fault, json.dumps({"rewards": [1.0]}).encode()
        )
        if self.fault == "500":
            self.send_error(500)
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body) * (2 if self.fault == "half" else 1)))
        self.end_headers()
        self.wfile.write(body)  # "half": and the connection ends

    def log_message(self, *_):
        pass


@contextmanager
def server(fault: str):
    handler = type("Faulty", (Handler,), {"fault": fault})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.daemon_threads = True
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/score"
        httpd.shutdown()


@pytest.mark.parametrize("fault", ["500", "malformed", "wrong", "half", "slow"])
def test_a_reward_server_that_fails_stops_the_run(short, tmp_path, fault):
    with server(fault) as url:
        code, error = outcome(short, tmp_path / "out", REWARD, url, "--reward.timeout", "2")
    assert code == 1 and "the reward " in error, error


def test_a_reward_server_that_is_not_there_stops_the_run(short, tmp_path):
    with server("") as url:
        pass
    code, error = outcome(short, tmp_path / "out", REWARD, url, "--reward.timeout", "2")
    assert code == 1 and "the reward " in error, error


def test_a_reward_server_that_works_trains(short, tmp_path):
    with server("") as url:
        code, error = outcome(short, tmp_path / "out", REWARD, url, "--reward.timeout", "2")
    assert code == 0, error
    assert os.path.exists(tmp_path / "out" / "model.safetensors")


EVALUATED = r"""
import json, sys
from openrlhf_apo.rewards.grading import grade

answers = json.loads(sys.argv[1])
forms = ["{}", "the answer is {}", "= {}", "\\boxed{{{}}}", "#### {}", "${}$", "answer: 3+{}", "(1+{})*2"]
grade("so it is 1/2", "3", "lenient"), grade("\\boxed{\\frac{1}{2}}", "3", "strict")  # what is imported late
seen = []

def hook(event, args):
    if args and isinstance(args[0], (str, bytes)):
        seen.append([event, args[0] if isinstance(args[0], str) else args[0].decode()])

sys.addaudithook(hook)
for answer in answers:
    for form in forms:
        for mode in ("lenient", "strict"):
            grade(form.format(answer), "18", mode)
print(json.dumps(seen))
"""


def test_an_answer_is_never_run_as_code():
    """math-verify hands SymPy's parse_expr, which calls eval, what its pattern of an expression matched: digits and
    operators. No name of an answer gets there, so none can be called; LaTeX goes through a grammar."""
    answers = ["__import__('os').system('touch owned')", "1+__import__('os').system('x')", "(1).__class__", "2**3+1"]
    answers += [
        "lambda: 0",
        "9*(1+2)",
        "open('owned','w')",
        "eval('1')",
        "exec(chr(49))",
        "[x for x in (1,)]",
        "f'{1}'",
    ]
    answers += ["os.getpid()", "1 if True else 2", r"\text{__import__('os')}", "１+２", "quit()", "print(1)", "1/2"]
    found = subprocess.run(
        [sys.executable, "-c", EVALUATED, json.dumps(answers)], capture_output=True, text=True, timeout=120, check=True
    )
    seen = json.loads(found.stdout)
    evaluated = {source for event, source in seen if event in ("compile", "exec")}
    evaluated = {source for source in evaluated if not source.startswith(("def monomial_", "from sympy import *"))}
    evaluated -= {"Expression"}  # these are SymPy's own
    numbers = re.compile(r"(?:(?:Integer|Float) \('?[\d.]+'? ?\)|[\d\s+\-*/()])+")
    assert any("**" in source for source in evaluated)  # the hook sees them
    assert [source for source in evaluated if not numbers.fullmatch(source)] == []
    assert [event for event, _ in seen if event.startswith(("os.", "subprocess", "socket", "shutil"))] == []
