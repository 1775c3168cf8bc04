"""How a rollout is made: dynamic sampling, guidance, and what training does to rewards and adds to a step."""

import json

import pytest
import torch

from openrlhf_apo.objectives import Adrpo, Guidance, Terms
from openrlhf_apo.rewards.reward import Reward
from openrlhf_apo.trainer.clock import Clock
from openrlhf_apo.trainer.handles import SamplingSettings
from openrlhf_apo.trainer.length_penalty import LengthPenalty
from openrlhf_apo.trainer.prompts import PromptRow, PromptStream
from openrlhf_apo.trainer.regularizer import Regularizer
from openrlhf_apo.trainer.rollouts import EngineRollouts, GroupFilter
from openrlhf_apo.trainer.samples import Sample
from openrlhf_apo.trainer.scoring import Scorer
from openrlhf_apo.trainer.step import Step

P = 4


class FakeEngine:
    """EngineHandle: answers are numbered, and made of one token."""

    rested = 0

    def rest(self):
        self.rested += 1

    def generate(self, prompts, settings, prefix=None):
        samples = []
        for prompt in prompts:
            ids = [7] + (prefix([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) if prefix else [])
            for k in range(settings.samples_per_prompt):
                response = f"{prompt.group_id} {k + 1}"
                samples.append(Sample(prompt.group_id, prompt.text, "", "", ids, [k + 1], response, [-1.0], False))
        return samples

    def begin(self, prompts, settings, prefix=None):
        return lambda: self.generate(prompts, settings, prefix)


class RewardByGroup:
    """Equal rewards in every group whose id is not a multiple of `period`."""

    not_verified = 0

    def __init__(self, period: int):
        self.period = period

    def __call__(self, answers, max_failures):
        numbers = [tuple(map(int, answer.response.split())) for answer in answers]
        return [Reward(float(token > 2 and group % self.period == 0)) for group, token in numbers]


def rollouts(period=1, **settings) -> EngineRollouts:
    prompts = PromptStream([PromptRow(f"p{i}", "") for i in range(10)], seed=0, episodes=2)
    sampling = SamplingSettings(P, 1.0, 1.0, 4, 64, 0)
    return EngineRollouts(prompts, 4, sampling, FakeEngine(), Scorer(RewardByGroup(period), 0), **settings)


def test_groups_of_equal_rewards_are_replaced_by_further_prompts():
    source = rollouts(period=3, keep=GroupFilter(), max_generations=10)
    samples = source.sample(1, Clock())
    assert [s.group_id for s in samples[::P]] == [0, 3, 6, 9]
    assert source.metrics == {"generations": 3, "filtered_groups": 6, "stale_groups": 0, "surplus_groups": 0}
    assert source.prompts.position == 10 and len(source) == 6 and not source.exhausted
    assert [s.group_id for s in source.sample(2, Clock())[::P]] == [12, 15, 18]  # of the second episode, which ends
    assert source.exhausted


def groups_of(source: EngineRollouts, rollout: int) -> list[tuple[int, bool]]:
    """(group, stale) of a rollout."""
    return [(s.group_id, s.stale) for s in source.sample(rollout, Clock())[::P]]


def test_what_a_rollout_has_no_room_for_is_trained_on_by_the_next_ones_of_the_episode():
    source = rollouts(generate_batch=9)
    assert groups_of(source, 1) == [(0, False), (1, False), (2, False), (3, False)]
    assert source.metrics == {"generations": 1, "stale_groups": 0, "surplus_groups": 5}
    assert groups_of(source, 2) == [(4, True), (5, True), (6, True), (7, True)]  # the engine is not asked
    assert source.metrics == {"generations": 0, "stale_groups": 4, "surplus_groups": 1}
    assert source.engine.rested == 1  # a sync has woken it, and nothing was sampled
    assert groups_of(source, 3) == [(9, False), (8, True)]  # fresh ones first; the episode ends
    assert groups_of(source, 4)[0] == (10, False) and not source.exhausted
    assert [len(groups_of(source, rollout)) for rollout in (5, 6)] == [4, 2] and source.exhausted and len(source) == 6


def test_a_surplus_at_the_end_of_an_episode_is_its_last_rollout():
    source = rollouts(generate_batch=10)
    sizes, drawn = [], []
    for rollout in range(1, len(source) + 1):
        assert not source.exhausted
        groups = groups_of(source, rollout)
        sizes.append(len(groups))
        drawn += [group for group, _ in groups]
        assert source.prompts.position == (10 if rollout <= 3 else 20)
    assert sizes == [4, 4, 2, 4, 4, 2] and drawn == list(range(20)) and source.exhausted


def test_a_filter_keeps_its_surplus_too_and_no_good_group_is_lost_or_used_twice():
    source = rollouts(period=2, keep=GroupFilter(), max_generations=10, generate_batch=6)
    assert groups_of(source, 1) == [(0, False), (2, False), (4, False), (6, False)]
    assert source.metrics == {"generations": 2, "filtered_groups": 5, "stale_groups": 0, "surplus_groups": 1}
    assert groups_of(source, 2) == [(8, True)] and not source.exhausted
    assert [group for group, _ in groups_of(source, 3) + groups_of(source, 4)] == [10, 12, 14, 16, 18]
    assert source.exhausted


def test_the_surplus_is_part_of_the_state():
    straight, resumed = rollouts(generate_batch=9), rollouts(generate_batch=9)
    straight.sample(1, Clock())
    state = json.loads(json.dumps([straight.prompts.state_dict(), straight.state_dict()]))
    resumed.prompts.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    for rollout in (2, 3, 4):
        assert resumed.sample(rollout, Clock()) == straight.sample(rollout, Clock())


def test_guidance_counts_the_answers_that_it_guided():
    class Counted(Guidance):
        def step(self, accuracy):
            counted.append(accuracy)

    counted: list[float] = []
    source = rollouts(period=2, generate_batch=10, guidance=Counted(share=0.5, length=3))
    source.sample(1, Clock())
    assert len(counted) == 1 and source.metrics["guidance_tokens"] == 3
    source.sample(2, Clock())
    assert len(counted) == 1 and "guidance_tokens" not in source.metrics  # of stale groups alone


def test_a_rollout_ends_with_its_episode_and_the_last_one_may_be_short():
    source = rollouts()
    drawn = [[s.group_id for s in source.sample(number, Clock())[::P]] for number in range(1, len(source) + 1)]
    assert drawn == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15, 16, 17], [18, 19]]
    assert source.exhausted


def test_a_rollout_that_cannot_be_filled_is_short_and_says_so(caplog):
    source = rollouts(period=3, keep=GroupFilter(), max_generations=2)
    assert [s.group_id for s in source.sample(1, Clock())[::P]] == [0, 3, 6]
    assert source.metrics == {"generations": 2, "filtered_groups": 5, "stale_groups": 0, "surplus_groups": 0}
    assert "3 of 4 groups are left after 2 batches" in caplog.text


def test_without_a_filter_nothing_is_drawn_twice():
    source = rollouts(period=3)
    assert len(source.sample(1, Clock())) == 4 * P and source.metrics == {}


def test_a_range_of_mean_rewards_narrows_the_filter():
    group = [Sample(0, "", "", "", [1], [1], "", [0.0], False, reward) for reward in (0.0, 0.5, 1.0)]
    assert GroupFilter()(group) and GroupFilter((0.0, 1.0))(group)
    assert not GroupFilter((0.5, 1.0))(group) and not GroupFilter()(group[:1] * 3)


def test_guided_answers_follow_the_free_ones_of_their_group():
    source = rollouts(guidance=Guidance(share=0.5, length=3))
    samples = source.sample(1, Clock())
    assert [s.group_id for s in samples[::P]] == [0, 1, 2, 3]
    for start in range(0, len(samples), P):
        assert [s.prompt_ids for s in samples[start : start + P]] == [[7]] * 2 + [[7, 1, 2, 3]] * 2
    assert source.metrics == {"guidance_tokens": 3}
    assert source.guidance.state_dict()["accuracies"] == [0.0]


@pytest.mark.parametrize(
    "settings", [(20, 5.0, 1.0, None), (20, 5.0, 0.5, -0.5), (20, None, 1.0, 0.3), (8, 8.0, 2.0, 0)]
)
def test_length_penalties_are_openrlhfs(settings):
    from types import SimpleNamespace

    from openrlhf.trainer.ppo_utils.length_penalty import apply_length_penalties

    limit, buffer, factor, stop = settings
    args = SimpleNamespace(
        rollout=SimpleNamespace(max_new_tokens=limit),
        reward=SimpleNamespace(
            overlong_buffer_len=buffer, overlong_penalty_factor=factor, stop_properly_penalty_coef=stop
        ),
    )
    lengths = list(range(1, limit + 1))
    theirs = SimpleNamespace(
        rewards=torch.ones(limit, dtype=torch.float64),
        response_length=torch.tensor(lengths),
        truncated=torch.tensor([length == limit for length in lengths]),
        info={},
    )
    apply_length_penalties([theirs], args)
    penalty = LengthPenalty(limit, buffer, factor, stop)
    ours = [penalty(Sample(0, "", "", "", [1], [1] * n, "", [0.0] * n, n == limit, 1.0)) for n in lengths]
    assert ours == pytest.approx(theirs.rewards.tolist(), abs=1e-12)


def columns(regularizer: Regularizer) -> dict:
    rewards = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    lengths = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    terms = Terms({})
    regularizer.add(terms, Step(0, 0, 0, [], rewards, lengths))
    return {name: values.tolist() for name, values in terms.columns.items()}


def test_regularizers_are_means_over_the_tokens_of_the_step():
    assert columns(Regularizer()) == {}
    assert columns(Regularizer(kl=0.3, entropy=0.0)) == {"kl": [0.3 / 30] * 8, "entropy": [0.0] * 8}
    assert columns(Regularizer(kl=0.3, kl_in_reward=True)) == {"kl_reward": [0.3] * 8}
    z = 0.5 / (1 / 3) ** 0.5
    betas = [0.1 + z, 0.1 + z, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1]
    adrpo = Regularizer(kl=0.3, adrpo=Adrpo(beta_0=0.1))
    assert columns(adrpo)["kl"] == pytest.approx([beta / 30 for beta in betas], rel=1e-6)
