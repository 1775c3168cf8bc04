"""One rollout of `--loss openrlhf`: OpenRLHF's experience maker and PPO step, unchanged, by OpenRLHF's flags."""

import torch
from openrlhf.trainer.ppo_utils.experience import Experience, balance_experiences
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker
from openrlhf.trainer.ppo_utils.kl_controller import FixedKLController
from openrlhf.trainer.ray.launcher import RayActorGroup

from openrlhf_apo.cluster.calls import get_all
from openrlhf_apo.ranks.micro_batch import MicroBatch
from openrlhf_apo.trainer.kl_controller import AdaptiveKl
from openrlhf_apo.trainer.samples import Sample

REPORTED = ("policy_loss", "kl", "ppo_kl", "ppo_clip_ratio", "entropy_loss", "return")


class OpenRLHFUpdate:
    def __init__(
        self,
        actors: RayActorGroup,
        reference: RayActorGroup | None,
        strategy,
        tokenizer,
        adaptive_kl: AdaptiveKl | None,
        timeout: float,
    ):
        self.args, self.actors, self.pad_token_id = strategy.args, actors, tokenizer.pad_token_id
        self.timeout = timeout
        self.adaptive_kl = adaptive_kl
        self.kl_controller = adaptive_kl or FixedKLController(self.args.algo.kl.init_coef)
        self.maker = RemoteExperienceMaker(actors, None, None, reference, self.kl_controller, strategy, tokenizer)

    def run(self, groups: list[list[Sample]], rollout: int) -> dict[str, float]:
        if not groups:
            return {}
        samples = [self._experience(sample) for group in groups for sample in group]
        experiences = self.maker.make_experience_batch(samples)
        mismatch = _mean_mismatch(experiences)
        if self.args.train.dynamic_batch_enable:
            experiences = balance_experiences(experiences, self.args)
        refs = self.actors.async_run_method_batch(method_name="append", experience=experiences)
        get_all(refs, self.timeout, "the hand-over of experiences")
        if self.args.ds.enable_sleep:
            self._all("reload_states")
        status = self._all("fit", kl_ctl=self.kl_controller.value)[0]
        if self.args.ds.enable_sleep:
            self._all("offload_states")
        metrics = {key: status[key] for key in REPORTED if key in status}
        if self.adaptive_kl is not None:
            metrics["kl_coef"] = self.adaptive_kl.value
        if "kl" in status:
            self.kl_controller.update(status["kl"], len(samples))
        if len(groups[0]) > 1:  # a single sample varies from none, and teaches all the same
            varied = sum(len({sample.reward for sample in group}) > 1 for group in groups)
            metrics["zero_variance_fraction"] = 1.0 - varied / len(groups)
        return metrics | {
            "grad_norm": status["actor_grad_norm"],
            "lr": status["actor_lr"],
            "rollout_mismatch": mismatch,
        }

    def _all(self, method: str, **arguments) -> list:
        return get_all(self.actors.async_run_method(method, **arguments), self.timeout, f"OpenRLHF's {method}")

    def _experience(self, sample: Sample) -> Experience:
        batch = MicroBatch.of([sample], self.pad_token_id)
        reward = torch.tensor([sample.reward])
        places = batch.action_mask[0].nonzero()
        return Experience(
            sequences=batch.sequences,
            attention_mask=batch.attention_mask,
            action_mask=batch.action_mask,
            rollout_log_probs=batch.rollout_log_probs,
            prompts=[sample.prompt],
            labels=[sample.label],
            images=[None],
            mm_train_inputs=[None],
            rewards=reward,
            scores=reward,
            response_length=places[-1] - places[0] + 1,
            truncated=torch.tensor([sample.truncated]),
            total_length=torch.tensor([float(sample.total_length)]),
            info={"reward": reward},
        )


def _mean_mismatch(experiences: list[Experience]) -> float:
    """Mean over tokens of |log π_θ − log π_engine|, nats; θ is still the weights that sampled."""
    gap = sum(((e.action_log_probs - e.rollout_log_probs).abs() * e.action_mask).sum().item() for e in experiences)
    return gap / sum(e.action_mask.sum().item() for e in experiences)
