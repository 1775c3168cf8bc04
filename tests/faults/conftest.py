import pytest


@pytest.fixture(scope="session")
def short(flags) -> list[str]:
    """A run of two rollouts of 4 prompts x 4 answers; a second value of a flag replaces the first."""
    return [
        *flags,
        *("--data.max_samples", "8", "--rollout.batch_size", "4", "--rollout.n_samples_per_prompt", "4"),
        *("--train.batch_size", "16", "--rollout.max_new_tokens", "6"),
    ]
