"""`--reward math_verify`: 1 when the last boxed answer equals the label, else 0."""

from collections.abc import Sequence

from openrlhf_apo.rewards.math_verify import grade_many
from openrlhf_apo.rewards.reward import Answer, Reward


class MathVerifyReward:
    """An answer that hangs, kills or confuses the verifier is a wrong one, and is counted in `not_verified`.

    timeout: seconds an answer may take.
    """

    def __init__(self, timeout: float):
        self.timeout = timeout
        self.not_verified = 0

    def check_label(self, label: object) -> str | None:
        if isinstance(label, bool) or not isinstance(label, str | int | float) or label == "":
            return f"--reward math_verify needs an answer as label (text or a number), got {label!r}"
        return None

    def __call__(self, answers: Sequence[Answer], max_failures: int) -> list[Reward]:
        labels = [str(answer.label) for answer in answers]
        grades = grade_many([answer.response for answer in answers], labels, timeout=self.timeout)
        self.not_verified += sum(grade.outcome != "ok" for grade in grades)
        return [Reward(grade.score) for grade in grades]
