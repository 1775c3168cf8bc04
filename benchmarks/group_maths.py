"""What the driver's maths on whole groups costs: GroupObjective.terms, by group size and number of prompts.

    .venv/bin/python benchmarks/group_maths.py

The policy's handle answers at once, so what is timed is the driver alone: log-ratios, target, alpha, coefficients and
their metrics, in float64, for `--loss apo` and every alpha mode. The step is the second of a rollout, where the policy
has left its anchor. The share is of a real step with as many answers: an embedded run of the tiny model (16 + 32
tokens, the shortest step that there is), timed here and taken as linear in the answers.
"""

import random
import time

import torch
from measure import alternated, bend, exponent, make_parser, medians, print_ratios, print_table, ratio, write_json
from workload import Work, run_product

from openrlhf_apo.alpha import CONTROLLERS, build_alpha_controller
from openrlhf_apo.trainer.group_objective import GroupObjective, GroupPlan
from openrlhf_apo.trainer.samples import Sample
from openrlhf_apo.trainer.step import Report, Step

GROUP_SIZES = (8, 64, 512)
PROMPTS = (16, 64, 256, 1024)
AIMS = {"share of a step": "<= 0.005"}


class InstantPolicy:
    """What terms asks of a PolicyHandle, known beforehand."""

    def __init__(self, count: int):
        numbers = random.Random(0)
        self.anchor = [numbers.gauss(-40.0, 5.0) for _ in range(count)]
        self.current = [value + numbers.gauss(0.0, 0.3) for value in self.anchor]
        self.left_anchor = False

    def log_prob_sums(self, step: int, weights: str = "policy", **_) -> list[float]:
        return self.current if self.left_anchor else self.anchor


def make_step(prompts: int, group: int) -> Step:
    """The second optimizer step of a rollout; rewards of 0 and 1, answers of 32 tokens."""
    sample = Sample(0, "p", "", "", [1] * 16, [1] * 32, "", [-2.0] * 32, False, 1.0)
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(2, (prompts, group), generator=generator).double()
    lengths = torch.full((prompts, group), 32.0, dtype=torch.float64)
    return Step(index=1, update=1, rollout=0, groups=[[sample] * group] * prompts, rewards=rewards, lengths=lengths)


def time_terms(mode: str, prompts: int, group: int) -> dict:
    """Seconds of the fastest of three calls, after one that is not counted."""
    policy, step = InstantPolicy(prompts * group), make_step(prompts, group)
    objective = GroupObjective(policy, GroupPlan("apo", controller=build_alpha_controller(mode)), vocab_size=512)
    objective.begin_rollout(0, 2)
    policy.left_anchor = True
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        terms = objective.terms(step)
        seconds.append(time.perf_counter() - start)
    report = Report(policy.current, [0.0] * len(policy.current), 1.0, 1e-5, 0.0, {}, 1.0)
    objective.after_update(step, report)
    assert len(terms.columns["log_prob"]) == prompts * group
    return {"seconds": min(seconds[1:]), "prompts": prompts, "group": group, "mode": mode}


def fits(middle: dict[str, dict], modes: list[str], sizes: list[tuple[int, int]]) -> dict[str, dict]:
    """{mode: exponent of the seconds in the answers, over those of 4,096 and more, and where they bend upwards}."""
    found = {}
    for mode in modes:
        points = sorted(
            (prompts * group, middle[name_of(mode, prompts, group)]["seconds"]) for prompts, group in sizes
        )
        largest = [point for point in points if point[0] >= 4096] or points
        answers, seconds = zip(*largest, strict=True)
        found[mode] = {"exponent": exponent(answers, seconds) if len(set(answers)) > 1 else None}
        distinct = dict(largest)  # the same number of answers, in other groups
        found[mode]["bends_at"] = bend(list(distinct), list(distinct.values()))
    return found


def name_of(mode: str, prompts: int, group: int) -> str:
    return f"{mode} {prompts} x {group}"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--prompts", nargs="+", type=int, default=list(PROMPTS))
    parser.add_argument("--groups", nargs="+", type=int, default=list(GROUP_SIZES), metavar="P")
    parser.add_argument("--modes", nargs="+", choices=CONTROLLERS, default=list(CONTROLLERS))
    parser.add_argument("--steps", type=int, default=20, help="rollouts of the real run")
    args = parser.parse_args()
    sizes = [(prompts, group) for prompts in args.prompts for group in args.groups]
    calls = {
        name_of(mode, prompts, group): lambda mode=mode, prompts=prompts, group=group: time_terms(mode, prompts, group)
        for mode in args.modes
        for prompts, group in sizes
    }
    work = Work(steps=args.steps)
    calls["real step"] = lambda: run_product(work, ["--runtime", "embedded", "--loss", "apo"])
    measurements = alternated(calls, args.runs)
    middle = medians(measurements)
    per_answer = middle["real step"]["step_s"] / (work.prompts * work.group)
    rows, worst = [], dict.fromkeys(args.modes, 0.0)
    for mode in args.modes:
        for prompts, group in sizes:
            seconds, answers = middle[name_of(mode, prompts, group)]["seconds"], prompts * group
            share = seconds / (answers * per_answer)
            worst[mode] = max(worst[mode], share)
            rows.append([mode, str(prompts), str(group), 1e3 * seconds, 1e6 * seconds / answers, f"{share:.3%}"])
    print_table(["alpha", "prompts", "P", "ms a step", "µs an answer", "share of a step"], rows)
    fitted = fits(middle, args.modes, sizes)
    print()
    for mode, fit in fitted.items():
        bends = f"bends upwards at {fit['bends_at']:,} answers" if fit["bends_at"] else "no bend upwards"
        if fit["exponent"] is not None:
            print(f"{mode}: seconds grow as answers^{fit['exponent']:.2f}, {bends}")
    found = {f"{mode}: share of a step": ratio(share, 1.0, "lower") for mode, share in worst.items()}
    print_ratios(found, AIMS)
    write_json(args.json, "group_maths", measurements, found, fits=fitted)


if __name__ == "__main__":
    main()
