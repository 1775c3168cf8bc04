"""`--reward.model_name_or_path`: OpenRLHF's reward model in Ray actors of its own."""

import ray
from openrlhf.trainer.ray.launcher import RayActorGroup
from openrlhf.trainer.ray.launcher import RewardModelActor as UpstreamReward
from torch import nn

from openrlhf_apo.cluster.calls import get_all
from openrlhf_apo.ranks.micro_batch import pad_right
from openrlhf_apo.trainer.layout import MicroBatchLimit, make_layout


class RewardActor(UpstreamReward.__ray_metadata__.modified_class):
    """One rank."""

    def init_model_from_pretrained(self, strategy, pretrain):
        super().init_model_from_pretrained(strategy, pretrain)
        if strategy.args.reward.normalize_enable:
            set_mean_and_std(strategy._unwrap_model(self.model))

    def rate(self, micro_batches: list[list[list[int]]]) -> list[float]:
        """micro_batches: token ids of each sequence of each. The reward of each sequence, in order."""
        return [reward for batch in micro_batches for reward in self.forward(*pad_right(batch)).float().tolist()]


def set_mean_and_std(model: nn.Module) -> None:
    """openrlhf/models/model.py:192-198 fills these buffers when it makes the model, which transformers 5 does without
    memory; no checkpoint holds them, so that they come out of its loader with any value."""
    model.mean.fill_(model.config.mean)
    model.std.fill_(model.config.std)


class RayRewardModel:
    """The actors, as the driver asks them. shares_gpus: cached memory is given back after each call, as OpenRLHF
    does."""

    def __init__(self, limit: MicroBatchLimit, timeout: float, shares_gpus: bool):
        self.limit, self.timeout, self.shares_gpus = limit, timeout, shares_gpus
        self.group: RayActorGroup | None = None  # started once the run's data has been read

    def rate(self, sequences: list[list[int]]) -> list[float]:
        assert self.group is not None
        actors, duplicates = self.group._actor_handlers, self.group.duplicate_actors
        layout = make_layout(list(map(len, sequences)), len(actors) // duplicates, self.limit)
        shares = [[[sequences[i] for i in batch] for batch in rank] for rank in layout.micro_batches]
        refs = [actor.rate.remote(shares[i // duplicates]) for i, actor in enumerate(actors)]
        rewards = get_all(refs, self.timeout, "the reward model")[::duplicates]
        if self.shares_gpus:
            get_all([actor.empty_cache.remote() for actor in actors], self.timeout, "the reward model's empty_cache")
        return layout.merge(rewards, len(sequences))


def reward_group(args, placement, fraction: float) -> RayActorGroup:
    """args: OpenRLHF's settings. placement: a placement group. fraction: of a GPU that each actor takes."""
    duplicates = args.ds.ring_attn_size * args.ds.tensor_parallel_size
    actor = ray.remote(num_gpus=1)(RewardActor)
    nodes, gpus = args.reward.num_nodes, args.reward.num_gpus_per_node
    return RayActorGroup(nodes, gpus, actor, placement, fraction, duplicates)
