"""`report --diag`: read saved rollouts, draw their diagnosis and put it in a table."""

from pathlib import Path

import torch

from openrlhf_apo.analysis.diagnosis import ALPHAS, PAPER_ALPHAS, SPREAD, Diagnosis, diagnose
from openrlhf_apo.analysis.diagnosis_figure import build_diagnosis_figure
from openrlhf_apo.trainer.rollout_files import RolloutFiles, saved_rollouts
from openrlhf_apo.trainer.samples import GroupError, whole_groups

QUANTITIES = {
    "variance": "Var[g], Eq. 11",
    "noise_to_signal": "Var[g] / |E g|²",
    "centred_variance": "Var[g], centred",
    "centred_noise_to_signal": "Var[g] / |E g|², centred",
    "curvature": "curvature C_α",
}


def save_diagnosis(directories: list, out, beta_r: float, tau_anc: float) -> str:
    """Draw the rollouts of all `directories` together into the PNG file `out`; returns the table.

    A directory is one that --apo.save_rollouts wrote, or that of a run which saved them.
    """
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
    found = [(saved_rollouts(path), path) for path in map(Path, directories)]
    directories = [files.directory if files else path for files, path in found]
    diagnosis = diagnose(load_rewards(directories), beta_r, tau_anc)
    if len(directories) == 1:
        name = "/".join(Path(directories[0]).resolve().parts[-2:])
    else:
        name = f"rollouts of {len(directories)} directories"
    figure = build_diagnosis_figure(diagnosis, name)
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, format="png")
    return table(diagnosis)


def load_rewards(directories: list) -> torch.Tensor:
    """rewards[G, P] of every group of every rollout that --apo.save_rollouts wrote into the directories.

    Raises ValueError naming the directory without rollouts, or the file that is torn or holds a group of another size.
    """
    groups, group_size = [], None
    for directory in directories:
        paths = sorted(Path(directory).glob("rollout_*.jsonl"))
        if not paths:
            raise ValueError(f"{directory} has no rollout_*.jsonl: give a directory that --apo.save_rollouts wrote")
        for path in paths:
            samples = RolloutFiles(directory).read(int(path.stem.removeprefix("rollout_")))
            group_size = group_size or sum(sample.group_id == samples[0].group_id for sample in samples)
            try:
                groups += whole_groups(samples, group_size)
            except GroupError as error:
                raise ValueError(f"{path}: {error}") from None
    if not groups:
        raise ValueError(f"the rollouts in {directories[0]} hold no samples")
    return torch.tensor([[sample.reward for sample in group] for group in groups], dtype=torch.float64)


def table(diagnosis: Diagnosis) -> str:
    """Medians over the groups whose rewards differ, at the paper's values of α."""
    lines = [str(diagnosis), "Medians over the groups. g: the gradient of one answer drawn from p."]
    columns = "".join(f"{f'α {alpha:g}':>9}" for alpha in PAPER_ALPHAS)
    for spread, state in ((0.0, "at the anchor, as saved"), (SPREAD, f"synthetic log-ratios, N(0, {SPREAD:g}²)")):
        lines += ["", f"{state:<34}{columns}{'least at α':>13}"]
        for quantity, label in QUANTITIES.items():
            medians = diagnosis.curves[quantity, spread][:, 1]
            values = "".join(f"{medians[ALPHAS.index(alpha)]:>9.3f}" for alpha in PAPER_ALPHAS)
            least = "the same" if torch.allclose(medians, medians[:1]) else f"{ALPHAS[int(medians.argmin())]:g}"
            lines.append(f"  {label:<32}{values}{least:>13}")
    lines += ["", f"{'Σ|c_i| over z-score REINFORCE':<34}{columns}{'groups':>13}"]
    for index, (mean, size) in enumerate(zip(diagnosis.difficulty, diagnosis.bin_sizes, strict=True)):
        values = "".join(f"{diagnosis.magnitudes[alpha][index, 1]:>9.3f}" for alpha in PAPER_ALPHAS)
        lines.append(f"  {f'mean reward {mean:.3f}':<32}{values}{size:>13}")
    return "\n".join(lines)
