"""The small parts of the trainer: layouts, groups, prompt order, rollout files."""

import json
import random

import pytest
import torch

from openrlhf_apo.errors import DataError, GroupError
from openrlhf_apo.objectives import Terms
from openrlhf_apo.trainer.layout import MicroBatchLimit, make_layout
from openrlhf_apo.trainer.prompts import PromptRow, PromptStream
from openrlhf_apo.trainer.rollout_files import RolloutFiles
from openrlhf_apo.trainer.samples import Sample, split_into_steps, whole_groups

pytestmark = pytest.mark.filterwarnings("ignore")


def sample(group: int, prompt: str | None = None) -> Sample:
    return Sample(group, prompt or f"prompt {group}", "1", "d", [1, 2], [3], "x", [-0.5], False, 1.0)


@pytest.mark.parametrize("num_samples", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "limit",
    [*map(MicroBatchLimit, (1, 3, 8, 100)), MicroBatchLimit(tokens=700), MicroBatchLimit(tokens=700, packed=True)],
    ids=["1", "3", "8", "100", "tokens", "packed tokens"],
)
def test_layout_is_a_partition_with_equally_many_micro_batches(num_samples, num_ranks, limit):
    lengths = [random.Random(i).randrange(1, 500) for i in range(num_samples)]
    layout = make_layout(lengths, num_ranks, limit)
    assert len({len(rank) for rank in layout.micro_batches}) == 1
    for micro_batch in [batch for rank in layout.micro_batches for batch in rank]:
        tokens = [lengths[i] for i in micro_batch]
        if limit.samples is not None:
            assert 0 < len(tokens) <= limit.samples
        else:
            cost = sum(tokens) if limit.packed else len(tokens) * max(tokens)
            assert 0 < cost <= 700
    owned = [
        i for r in range(num_ranks) for i, ghost in zip(layout.flat(r), layout.is_ghost[r], strict=True) if not ghost
    ]
    assert sorted(owned) == list(range(num_samples))
    values = [float(i + 1) for i in range(num_samples)]
    shares = [layout.share(Terms({"log_prob": torch.tensor(values)}), rank).columns for rank in range(num_ranks)]
    assert sum(share["log_prob"].sum().item() for share in shares) == sum(values)  # ghosts carry no coefficient
    assert sum(share["real"].sum().item() for share in shares) == num_samples
    assert layout.merge([share["log_prob"].tolist() for share in shares], num_samples) == values


def test_layout_balances_tokens():
    lengths = list(range(1, 65))
    layout = make_layout(lengths, 2, MicroBatchLimit(8))
    loads = [sum(lengths[i] for i in layout.flat(rank)) for rank in range(2)]
    assert abs(loads[0] - loads[1]) <= 1


def test_a_micro_batch_takes_as_many_tokens_as_it_may():
    lengths = [10, 60, 10, 20, 10, 10, 100]
    padded = make_layout(lengths, 1, MicroBatchLimit(tokens=50)).micro_batches[0]
    assert [[lengths[i] for i in batch] for batch in padded] == [[100], [60], [20, 10], [10, 10, 10]]
    packed = make_layout(lengths, 1, MicroBatchLimit(tokens=50, packed=True)).micro_batches[0]
    assert [[lengths[i] for i in batch] for batch in packed] == [[100], [60], [20, 10, 10, 10], [10]]


def test_groups_are_whole_or_refused():
    samples = [sample(g) for g in (5, 3, 5, 3)]
    assert [[s.group_id for s in group] for group in whole_groups(samples, 2)] == [[5, 5], [3, 3]]
    with pytest.raises(GroupError, match=r"group 3 has 1 of 2 samples \(prompt 'prompt 3'\)"):
        whole_groups(samples[:3], 2)
    with pytest.raises(GroupError, match="group 5 has 3 of 2 samples"):
        whole_groups([*samples, sample(5)], 2)
    with pytest.raises(GroupError, match="mixes prompts"):
        whole_groups([sample(1, "a"), sample(1, "b")], 2)
    empty = sample(1)
    empty.response_ids = []
    with pytest.raises(GroupError, match="empty response"):
        whole_groups([sample(1), empty], 2)


def test_steps_are_whole_groups():
    groups = [[sample(g)] for g in range(5)]
    assert [len(step) for step in split_into_steps(groups, 2)] == [2, 2, 1]


def stream(seed=0, position=0) -> PromptStream:
    return PromptStream([PromptRow(f"p{i}", str(i), "d") for i in range(10)], seed, episodes=3, position=position)


def draw(prompts: PromptStream, count: int) -> list:
    """`count` prompts, in draws that end with an episode."""
    drawn = []
    while len(drawn) < count:
        drawn += prompts.draw(count - len(drawn))
    return drawn


def test_a_draw_ends_with_the_episode():
    prompts = stream(position=7)
    assert [len(prompts.draw(8)) for _ in range(5)] == [3, 8, 2, 8, 2]
    assert prompts.exhausted and prompts.draw(8) == []


def test_prompt_order_is_seeded_fresh_each_episode_and_resumable():
    prompts = draw(stream(), 30)
    assert [p.group_id for p in prompts] == list(range(30))
    episodes = [[p.text for p in prompts[k : k + 10]] for k in (0, 10, 20)]
    assert all(sorted(episode) == sorted(f"p{i}" for i in range(10)) for episode in episodes)
    assert episodes[0] != episodes[1] != episodes[2]
    assert [p.text for p in draw(stream(seed=1), 10)] != episodes[0]
    resumed = stream()
    resumed.load_state_dict(json.loads(json.dumps(stream(position=7).state_dict())))
    assert draw(resumed, 23) == prompts[7:]


def test_resuming_on_other_data_is_refused():
    other = PromptStream([PromptRow("p", "1")], 0, 1)
    with pytest.raises(DataError, match="10 prompts, the data set now has 1"):
        other.load_state_dict(stream().state_dict())


def test_rollout_files_round_trip(tmp_path):
    files = RolloutFiles(str(tmp_path / "rollouts"))
    samples = [sample(0), sample(1, "κ \u2028 \x00")]
    files.write(1, samples)
    assert len(files) == 1 and files.read(1) == samples
    with pytest.raises(ValueError, match="not a saved rollout"):
        files.read(2)
    path = tmp_path / "rollouts" / "rollout_00002.jsonl"
    path.write_text('{"reward": 1}\n')
    with pytest.raises(ValueError, match="rollout_00002.jsonl is not a saved rollout"):
        files.read(2)
    unscored = sample(0)
    unscored.reward = None
    files.write(2, [unscored])
    with pytest.raises(ValueError, match="no reward"):
        files.read(2)
