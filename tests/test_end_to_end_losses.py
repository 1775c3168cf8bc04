"""Every objective by the command: embedded, from saved rollouts where that suffices, and on Ray where the cluster's
own part is tested. Untrained model, dense reward: what is tested is the machinery."""

from functools import partial
from pathlib import Path

import pytest
from real_runs import DIGITS_REWARD, FIRST_IS_A_DIGIT, succeed, weight_error

from openrlhf_apo.objectives import GROUP_LOSSES, TOKEN_LOSSES
from openrlhf_apo.options.owners import uses
from openrlhf_apo.trainer.rollout_files import RolloutFiles
from openrlhf_apo.trainer.samples import whole_groups

embedded = partial(succeed, runtime="embedded")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def rollouts(flags, tmp_path_factory) -> str:
    """Five rollouts of an APO run from the engine."""
    out = tmp_path_factory.mktemp("apo")
    rows = embedded(flags, out, "--data.max_samples", "40", "--apo.save_rollouts", str(out / "rollouts"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    return str(out / "rollouts")


FROM_FILES = sorted((GROUP_LOSSES.keys() | TOKEN_LOSSES.keys()) - {"apo", "dapo", "g2rpo_a"})


@pytest.mark.parametrize("loss", FROM_FILES)
def test_every_loss_trains(training_flags, rollouts, tmp_path, loss):
    """apo, dapo, g2rpo_a and openrlhf have runs of their own."""
    length = ["--rollout.max_new_tokens", "12"] if uses(loss, "max_length") else []
    rows = embedded(training_flags, tmp_path, "--loss", loss, "--apo.load_rollouts", rollouts, *length)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["grad_norm"] > 0 and row["rollout_mismatch"] < 0.5 for row in rows)
    assert all(row["inner/log_ratio_std"][0] == 0 < row["inner/log_ratio_std"][1] for row in rows)


@pytest.mark.parametrize("file", ["model.safetensors", "adapter_model.safetensors"])
def test_our_grpo_step_is_openrlhfs(training_flags, rollouts, tmp_path, file):
    """One optimizer step per rollout, where OpenRLHF's shuffling of single samples cannot matter."""
    common = ["--apo.load_rollouts", rollouts, "--train.batch_size", "64", "--actor.adam.eps", "1e-2"]
    common += ["--algo.kl.init_coef", "0"]
    common += ["--ds.lora.rank", "4"] if file.startswith("adapter") else []
    ours = embedded(training_flags, tmp_path / "ours", *common, "--loss", "grpo", "--train.micro_batch_size", "16")
    theirs = ["--loss", "openrlhf", "--actor.loss_agg_mode", "seq-mean-token-mean"]
    theirs = succeed(training_flags, tmp_path / "theirs", *common, *theirs)
    assert [row["grad_norm"] for row in ours] == pytest.approx([row["grad_norm"] for row in theirs], rel=1e-4)
    assert weight_error(tmp_path / "ours", tmp_path / "theirs", file) <= 1e-5


def test_dapo_samples_groups_of_equal_rewards_anew(flags, tmp_path):
    reward = tmp_path / "first.py"
    reward.write_text(DIGITS_REWARD.replace("sum(c.isdigit() for c in query[len(prompt):]) / 16", FIRST_IS_A_DIGIT))
    rows = embedded(flags, tmp_path / "out", "--loss", "dapo", "--reward.remote_url", str(reward))
    assert all(row["zero_variance_fraction"] == 0 and row["generations"] + row["stale_groups"] >= 1 for row in rows)
    assert sum(row["filtered_groups"] for row in rows) > 0


def test_g2rpo_a_guides_a_share_of_each_group(flags, sums, tmp_path):
    more = ["--loss", "g2rpo_a", "--guidance.length", "4", "--guidance.share", "0.25"]
    rows = embedded(flags, tmp_path, *more, "--apo.save_rollouts", str(tmp_path / "rollouts"))
    assert rows[0]["guidance_tokens"] == 4 and all(1 <= row["guidance_tokens"] <= 4 for row in rows)
    for step, row in enumerate(rows, start=1):
        for group in whole_groups(RolloutFiles(str(tmp_path / "rollouts")).read(step), 8):
            lengths = [len(sample.prompt_ids) for sample in group]
            assert sorted(lengths) == lengths and lengths[5] == lengths[0]  # six free answers, then two guided ones
            assert lengths[6] == lengths[7] == lengths[0] + row["guidance_tokens"]
            assert [len(sample.shown) for sample in group] == [0] * 6 + [row["guidance_tokens"]] * 2  # characters
    assert all(row["rollout_mismatch"] < 1e-3 for row in rows)


OWN_TOKEN_LOSS = """
from dataclasses import dataclass
import torch
from openrlhf_apo.objectives import TokenLoss, ratio, token_loss
from openrlhf_apo.settings import setting

LOW, HIGH = 0.8, 1.2

@token_loss("toy")
@dataclass(eq=False)
class Toy(TokenLoss):
    strength: float = setting(1.0, "a factor", within="(0, 1]")
    aggregation = "sequence"

    def per_token(self, log_probs, old_log_probs, advantages, mask):
        r = ratio(log_probs, old_log_probs)
        gain = torch.min(r * advantages, r.clamp(LOW, HIGH) * advantages)
        return -self.strength * gain, gain != r * advantages
"""


def test_a_token_loss_of_your_own_is_what_it_says(training_flags, rollouts, tmp_path):
    """GRPO, written out, times a flag. On two ranks of Ray: test_fault_ray.py."""
    (tmp_path / "mine.py").write_text(OWN_TOKEN_LOSS)
    load = ["--apo.load_rollouts", rollouts]
    mine = ["--loss_path", str(tmp_path / "mine.py"), "--toy.strength", "0.5"]
    own = embedded(training_flags, tmp_path / "own", *mine, *load)
    grpo = embedded(training_flags, tmp_path / "grpo", "--loss", "grpo", "--algo.kl.init_coef", "0", *load)
    assert own[0]["inner/grad_norm"][0] == pytest.approx(0.5 * grpo[0]["inner/grad_norm"][0], rel=1e-5)
    assert all(row["grad_norm"] > 0 and row["rollout_mismatch"] < 0.5 for row in own)
    assert own[0]["inner/log_ratio_std"][0] == 0 < own[0]["inner/log_ratio_std"][1]


def test_a_loss_of_your_own_trains_like_the_built_in_one(training_flags, rollouts, tmp_path):
    mine = str(Path(__file__).parents[1] / "examples" / "python" / "my_loss.py")
    load = ["--apo.load_rollouts", rollouts]
    own = embedded(training_flags, tmp_path / "own", "--loss_path", mine, *load)
    built_in = embedded(training_flags, tmp_path / "built_in", "--loss", "adpo_softmax", *load)
    for a, b in zip(own, built_in, strict=True):
        assert a["inner/loss"] == pytest.approx(b["inner/loss"], abs=1e-9)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)
