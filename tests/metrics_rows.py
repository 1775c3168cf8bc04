"""Made-up lines of metrics.jsonl."""

import math

import numpy as np

PHASES = {"generate": 0.55, "reward": 0.04, "update": 0.33, "sync": 0.05}


def synthetic_run(mode: str, n_steps: int = 120, seed: int = 0) -> list[dict]:
    """Rows like those of a run of `mode` (guarded, ess, fixed, grpo) that learns: noisy, with evaluations."""
    rng = np.random.default_rng(seed)
    rows = [{"step": 0, "eval/pass1": 0.21, "time/eval": 1.4}]
    alpha = baseline = None
    for step in range(1, n_steps + 1):
        progress = 1 / (1 + math.exp(-6 * (step / n_steps - 0.4)))
        reward = float(np.clip(0.2 + 0.5 * progress + 0.05 * rng.normal(), 0, 1))
        row = {
            "step": step,
            "reward_mean": reward,
            "reward_std": 0.4,
            "zero_variance_fraction": float(np.clip(0.25 + 0.3 * progress + 0.08 * rng.normal(), 0, 1)),
            "truncated_fraction": float(np.clip(0.12 * (1 - progress) + 0.02 * rng.normal(), 0, 1)),
            "rollout_mismatch": 0.004 + 0.001 * abs(rng.normal()),
            "grad_norm": float(np.exp(0.3 * rng.normal() - 0.5 * progress)) * (12 if rng.random() < 0.03 else 1),
            "response_length": 96 - 30 * progress + 4 * rng.normal(),
            "reward_failures": 0,
            "tokens_per_s": 900 + 60 * rng.normal(),
        }
        row |= {f"time/{phase}": mean * (1 + 0.1 * rng.normal()) for phase, mean in PHASES.items()}
        if step % 20 == 0:
            row["eval/pass1"] = 0.21 + 0.45 * progress
            row["time/eval"] = 1.4
        row["time/step"] = sum(value for key, value in row.items() if key.startswith("time/")) + 0.05
        if mode != "grpo":
            spread = 0.25 + 0.35 * progress
            inner = [0.0] + [float(spread * k / 3 * (1 + 0.1 * rng.normal())) for k in (1, 2, 3)]
            row |= {
                "log_ratio_std": float(np.mean(inner)),
                "inner/log_ratio_std": inner,
                "divergence": 0.3 - 0.12 * progress + 0.02 * rng.normal(),
                "entropy_p": 1 - 0.1 * progress * (1 + 0.1 * rng.normal()),
                "entropy_q": 0.82 - 0.06 * progress + 0.015 * rng.normal(),
                "max_weight": 0.4,
                "ess": float(np.clip(0.5 + 0.25 * progress + 0.04 * rng.normal(), 0.1, 1)),
                "alpha": 0.6,
            }
        if mode == "guarded":
            confidence = [float(min(1, value * (0.5 + progress))) for value in inner]
            baseline = reward if baseline is None else 0.95 * baseline + 0.05 * reward
            improvement = max(0.0, math.tanh((reward - baseline) / 0.12))
            alphas = []
            for value in confidence:
                alpha = 0.9 if alpha is None else 0.9 * alpha + 0.1 * (0.9 - 0.55 * value * improvement)
                alphas.append(alpha)
            row |= {
                "alpha": float(np.mean(alphas)),
                "inner/alpha": alphas,
                "confidence": float(np.mean(confidence)),
                "inner/confidence": confidence,
                "improvement": improvement,
                "reward_baseline": baseline,
                "reward_scale": 0.12,
            }
        if mode == "ess":
            target = float(np.clip(0.62 + 0.5 * progress + 0.06 * rng.normal(), 0.3, 1.0))
            row["ess_outcome"] = "clamped_hi" if target > 0.9 else "clamped_lo" if target < 0.35 else "root"
            alpha = target if alpha is None else 0.9 * alpha + 0.1 * min(0.9, max(0.35, target))
            row |= {"alpha": alpha, "inner/alpha": [alpha] * 4}
        rows.append(row)
    return rows


def rewards_as_rows(rewards) -> list[dict]:
    """A line per reward, from step 1."""
    return [{"step": step, "reward_mean": float(reward)} for step, reward in enumerate(rewards, start=1)]
