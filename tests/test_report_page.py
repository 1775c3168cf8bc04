"""The report's page: whole HTML that needs nothing else, with what a run's directory holds."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.image import imread
from metrics_rows import synthetic_run

from openrlhf_apo.analysis.report import save_report
from openrlhf_apo.trainer.checkpoint_folder import CheckpointFolder
from openrlhf_apo.trainer.metrics import MetricsFile
from openrlhf_apo.trainer.rollout_files import RolloutFiles
from openrlhf_apo.trainer.samples import Sample

VOID = {"meta", "img", "link", "br", "input"}
RECORD = {
    "command": "python -m openrlhf_apo.cli.train_apo_ray --loss apo",
    "runtime": "embedded",
    "given": {"apo.beta_r": {"value": 0.5, "from": "command line"}},
    "settings": {"apo.beta_r": 0.5, "apo.tau_anc": 0.8},
    "versions": {"torch": "2.7", "ray": None},
}


class Page(HTMLParser):
    """Its tags, closed in order, its references and its text by the heading it stands under."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.sections: dict[str, str] = {}
        self.heading = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.references += [v or "" for name, v in attributes if name in ("src", "href", "srcset", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.heading = None

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "h3":
            self.handle_data(": ")

    def handle_data(self, data):
        if self.heading is None:
            self.heading = data
        self.sections[self.heading] = self.sections.get(self.heading, "") + data


def sample(group: int, response: str, reward: float, prompt: str = "1<2 & so?") -> Sample:
    return Sample(group, prompt, "2", "", [1], [2], response, [-1.0], False, reward)


def write_run(folder: Path, mode: str = "guarded") -> Path:
    file = MetricsFile(folder / "metrics.jsonl")
    for row in synthetic_run(mode, 20):
        file.write(row)
    return folder


def page_of(folder: Path) -> Page:
    save_report([folder], folder / "report.png")
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == [] and not page.tags & {"script", "link", "iframe", "object"}
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not re.search(r"url\(|@import|https?:|src=[\"']?//", html)
    return page


def test_a_run_of_metrics_alone_has_a_page_without_what_is_not_there(tmp_path):
    page = page_of(write_run(tmp_path, "grpo"))
    headings = ["Verdict", "First and last", "Curves", "Where the time goes, slowest first"]
    assert [heading for heading in page.sections if heading] == headings
    assert len(page.references) == 1 and "It learns" in page.sections["Verdict"]
    times = re.findall(r"(generate|update|sync)([\d.]+)", page.sections[headings[-1]])
    assert [phase for phase, _ in times] == ["generate", "update", "sync"]


def test_settings_and_environment_come_from_run_json(tmp_path):
    write_run(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(RECORD))
    sections = page_of(tmp_path).sections
    assert sections["Settings"].index("apo.beta_r0.5") < sections["Settings"].index("all settings")
    assert "apo.tau_anc0.8" in sections["Settings"] and RECORD["command"] in sections["Settings"]
    assert "torch2.7" in sections["Environment"] and "ray" not in sections["Environment"]


def test_without_run_json_settings_come_from_the_checkpoint(tmp_path):
    folder = CheckpointFolder(str(write_run(tmp_path) / "ckpt"), 3, 1.0, {"apo.beta_r": 0.25})
    folder.begin("global_step1")
    folder.finish("global_step1", 1, None)
    sections = page_of(tmp_path).sections
    assert "apo.beta_r0.25" in sections["Settings"] and "Environment" not in sections


def test_answers_of_several_rollouts_from_best_to_worst_as_text(tmp_path):
    files = RolloutFiles(write_run(tmp_path) / "rollouts")
    for rollout in range(1, 11):
        same = [sample(0, "boring", 0.0, "a prompt whose answers are all the same")] * 2
        answers = [sample(1, f"<b>{i}</b> of {rollout}", i / 8) for i in range(8)]
        files.write(rollout, same + answers)
    files.write(11, [])  # every group was dropped
    text = page_of(tmp_path).sections["Sample answers"]
    assert re.findall(r"Rollout (\d+): ", text) == ["1", "4", "7", "10"]
    last = text.partition("Rollout 10: ")[2]
    best_to_worst = [("0.875", "7"), ("0.625", "5"), ("0.25", "2"), ("0", "0")]
    assert re.findall(r"([\d.]+)<b>(\d)</b> of 10", last) == best_to_worst
    assert "1<2 & so?" in text and "label: 2" in text and "boring" not in text


def test_answers_come_from_where_the_run_saved_them(tmp_path):
    saved, run = tmp_path / "elsewhere", write_run(tmp_path / "run")
    RolloutFiles(str(saved)).write(1, [sample(0, "saved elsewhere", 1.0)])
    (run / "run.json").write_text(json.dumps({"settings": {"apo.save_rollouts": str(saved)}}))
    assert "saved elsewhere" in page_of(run).sections["Sample answers"]


def test_answers_come_from_samples_jsonl_where_there_are_no_rollouts(tmp_path):
    groups = [
        {"step": step, "prompt": "p", "label": "7", "responses": [f"answer {step}", "other"], "rewards": [0.25, 0.5]}
        for step in (1, 11)
    ]
    path = write_run(tmp_path) / "samples.jsonl"
    path.write_text("".join(json.dumps(group) + "\n" for group in groups) + '{"step": 21, "torn')
    text = page_of(tmp_path).sections["Sample answers"]
    assert re.findall(r"Rollout (\d+): ", text) == ["1", "11"]
    assert "label: 7" in text and "0.5other0.25answer 11" in text.replace("\n", "")
    path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="samples.jsonl: a line has no 'prompt'"):
        page_of(tmp_path)


def test_a_long_answer_is_cut_and_says_so(tmp_path):
    RolloutFiles(write_run(tmp_path) / "rollouts").write(1, [sample(0, "x" * 5000, 1.0)])
    text = page_of(tmp_path).sections["Sample answers"]
    assert text.count("x") < 4100 and "1,000 characters more" in text


def test_a_browser_shows_the_page(tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.skip(f"no browser to show the page with: none of {', '.join(names)}")
    RolloutFiles(write_run(tmp_path) / "rollouts").write(1, [sample(0, "an answer", 1.0)])
    page_of(tmp_path)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    shot = tmp_path / "shot.png"
    what = [f"--screenshot={shot}", "--window-size=1200,3000", (tmp_path / "report.html").as_uri()]
    done = subprocess.run([browser, *flags, *what], capture_output=True, text=True, timeout=120)
    assert shot.exists(), done.stderr
    pixels = imread(shot)[:, :, :3]
    inked = (pixels < 0.9).any(axis=(1, 2))
    assert inked[:500].mean() > 0.2 and inked[500:2000].mean() > 0.5  # the verdict, then the curves
