"""The moving average of the policy (--train.enable_ema): after every optimizer step, in float32, beside the policy."""

import pytest
import torch
from safetensors.torch import load_file
from test_embedded import run
from test_exactness import model_path, rollouts, spmd  # noqa: F401

from openrlhf_apo.cli.evaluate import main as evaluate
from openrlhf_apo.errors import OptionError, RunError

BETA = 0.7


@pytest.mark.parametrize("ranks, stages", [(1, ["embedded", 0]), (2, [2, 3])])
def test_it_averages_the_weights_after_every_step(tmp_path, model_path, rollouts, ranks, stages):  # noqa: F811
    cases = [(stage, {"samples": 11}, {"ema": BETA}) for stage in stages]
    start = torch.cat([w.flatten() for w in _weights(model_path)])
    for stage, result in zip(stages, spmd(tmp_path, model_path, rollouts, ranks, cases), strict=True):
        want = start
        assert len(result["trajectory"]) == 4
        for weights in result["trajectory"]:
            want = BETA * want + (1 - BETA) * weights
        assert (result["ema"] - want).abs().max() <= 1e-6, stage
        assert (result["ema"] - result["weights"]).abs().max() >= 1e-4, "it must lag, or equality proves nothing"
        if stage != "embedded":
            assert torch.equal(result["lent"], result["ema"]) and result["restored"], stage


def _weights(model_path):  # noqa: F811
    from transformers import AutoModelForCausalLM

    return [w.detach() for w in AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).parameters()]


@pytest.mark.parametrize("loss", ["apo", "grpo"])
def test_a_run_saves_it_beside_the_policy_and_says_so(flags, sums, tmp_path, caplog, capsys, loss):
    caplog.set_level("INFO")
    more = ["--loss", loss, "--data.max_samples", "16", "--ckpt.disable_ds", "--ckpt.save_steps", "1"]
    with pytest.raises(OptionError, match="--train.ema_beta has no effect without --train.enable_ema"):
        run(flags, tmp_path, "--train.ema_beta", "0.5")
    run(flags, tmp_path / "plain", "--loss", loss, "--data.max_samples", "16")
    run(flags, tmp_path / "out", *more[:4], "--train.enable_ema", "--train.ema_beta", "0.5")
    assert not (tmp_path / "plain" / "ema").exists()
    plain, policy, average = (load_file(tmp_path / f"{at}/model.safetensors") for at in ("plain", "out", "out/ema"))
    assert all(torch.equal(plain[name], policy[name]) for name in plain)  # training does not look at it
    assert any(not torch.equal(average[name], policy[name]) for name in policy)
    assert f"its moving average in {tmp_path}/out/ema" in caplog.text
    assert "| moving average | `ema/`, of every step's weights, β 0.5 |" in (tmp_path / "out/README.md").read_text()
    scored = ["--reward", flags[flags.index("--reward.remote_url") + 1], "--rollout.max_new_tokens", "4"]
    assert evaluate([str(tmp_path / "out/ema"), sums, "--limit", "2", "--data.max_len", "48", *scored]) == 0


def test_a_checkpoint_without_it_is_one_line(flags, tmp_path):
    few = ["--data.max_samples", "16", "--ckpt.save_steps", "1"]
    run(flags, tmp_path, *few)
    with_it = [*few, "--ckpt.load_enable", "--train.enable_ema"]
    with pytest.raises(OptionError, match="--train.enable_ema was False, now True"):
        run(flags, tmp_path, *with_it)
    with pytest.raises(RunError, match="has no ema weights: resume with the flags that wrote it"):
        run(flags, tmp_path, *with_it, "--ckpt.allow_changed", "train.enable_ema")
