"""The policy as a group of Ray actors: OpenRLHF's PolicyModelActor with a Learner inside."""

from openrlhf_apo import cpu

cpu.install()

import torch  # noqa: E402
from deepspeed.runtime.zero import GatheredParameters  # noqa: E402
from openrlhf.models import Actor  # noqa: E402
from openrlhf.trainer.ray.launcher import RayActorGroup  # noqa: E402
from openrlhf.trainer.ray.launcher import ReferenceModelActor as UpstreamReference  # noqa: E402
from openrlhf.trainer.ray.ppo_actor import PolicyModelActor as UpstreamPolicy  # noqa: E402
from torch import Tensor  # noqa: E402

from openrlhf_apo.trainer.anchor_weights import AnchorWeights  # noqa: E402
from openrlhf_apo.trainer.layout import Layout, make_layout  # noqa: E402
from openrlhf_apo.trainer.learner import Learner  # noqa: E402
from openrlhf_apo.trainer.rank_step import RankReport, RankTerms, merge_reports, rank_terms  # noqa: E402
from openrlhf_apo.trainer.ray_calls import get_all  # noqa: E402
from openrlhf_apo.trainer.samples import Sample  # noqa: E402
from openrlhf_apo.trainer.step import StepReport, StepTerms  # noqa: E402

ANCHORS_WITH_WEIGHTS = ("lagged", "ema", "reference")


class PolicyActor(UpstreamPolicy.__ray_metadata__.modified_class):
    """One rank. What `--loss openrlhf` needs is inherited; every other objective uses the learner."""

    def init_model_from_pretrained(self, strategy, pretrain, max_steps=None, vllm_engines=None):
        super().init_model_from_pretrained(strategy, pretrain, max_steps, vllm_engines)
        args, anchor, reference = strategy.args, None, None
        if args.apo.anchor in ANCHORS_WITH_WEIGHTS:
            anchor = AnchorWeights(self._frozen_model(strategy, pretrain), args.ds.zero_stage)
            if "anchor" in self.checkpoint_states:
                anchor.load_state_dict(self.checkpoint_states.pop("anchor"))
        if args.loss != "openrlhf" and (args.algo.kl.init_coef > 0 or args.adrpo.enable):
            same = anchor is not None and args.apo.anchor == "reference"
            reference = anchor.model if same else self._frozen_model(strategy, pretrain)
        self.learner = Learner(
            strategy,
            self.actor,
            self.actor_scheduler,
            self.tokenizer.pad_token_id,
            anchor=anchor,
            reference=reference,
            kl_estimator=args.algo.kl.estimator,
        )

    def _frozen_model(self, strategy, pretrain) -> Actor:
        """The initial weights, sharded like the policy's."""
        args = strategy.args
        model = Actor(
            pretrain,
            attn_implementation=args.ds.attn_implementation,
            param_dtype=args.ds.param_dtype,
            ds_config=strategy.get_ds_eval_config(),
            packing_samples=args.ds.packing_samples,
            temperature=args.rollout.temperature,
        )
        return strategy.prepare(model)

    def load_steps(self, steps: list[list[list[Sample]]]) -> None:
        self.learner.load_steps(steps)

    def log_prob_sums(self, step: int, weights: str) -> list[float]:
        return self.learner.log_prob_sums(step, weights)

    def record_old(self, step: int, entropy: bool) -> list[float]:
        return self.learner.record_old(step, entropy)

    def log_ratios(self, step: int) -> list[list[float]]:
        return self.learner.log_ratios(step)

    def apply(self, step: int, terms: RankTerms) -> RankReport:
        return self.learner.apply(step, terms)

    def update_anchor(self, beta: float) -> None:
        self.learner.anchor.update(self.actor, beta)

    def save_checkpoint(self, tag, client_states=None, metric_value=None, metric_key=None):
        if self.learner.anchor is not None:  # inside DeepSpeed's own file, so that the two cannot be torn apart
            client_states = client_states | {"anchor": self.learner.anchor.state_dict()}
        super().save_checkpoint(tag, client_states, metric_value, metric_key)

    def export_weights(self) -> dict[str, Tensor] | None:
        """All weights by name on rank 0, None elsewhere."""
        weights = {}
        for name, parameter in self.actor.model.module.named_parameters():
            with GatheredParameters([parameter], enabled=self.strategy.args.ds.zero_stage == 3):
                if self.strategy.is_rank_0():
                    weights[name] = parameter.detach().cpu().clone()
        return weights or None

    def weight_sums(self) -> dict[str, tuple[float, float]] | None:
        """{name: (Σ w, Σ w²)} in float64 on rank 0, None elsewhere."""
        weights = self.export_weights()
        if weights is None:
            return None
        return {name: (w.double().sum().item(), w.double().square().sum().item()) for name, w in weights.items()}


class ReferenceActor(UpstreamReference.__ray_metadata__.modified_class):
    """OpenRLHF's reference model, for the KL term of `--loss openrlhf`. A class of this module, because importing
    this module is what prepares a worker process for OpenRLHF's."""


class RayPolicy:
    """PolicyHandle over a RayActorGroup. Actors of one ring-attention or tensor-parallel group do the same work."""

    def __init__(self, group: RayActorGroup, micro_batch_size: int, timeout: float):
        self.group, self.micro_batch_size, self.timeout = group, micro_batch_size, timeout
        self.actors = group._actor_handlers
        self.num_ranks = len(self.actors) // group.duplicate_actors
        self.layouts: list[Layout] = []
        self.num_samples: list[int] = []

    def load_steps(self, steps: list[list[Sample]]) -> None:
        lengths = [[sample.total_length for sample in step] for step in steps]
        self.layouts = [make_layout(each, self.num_ranks, self.micro_batch_size) for each in lengths]
        self.num_samples = [len(step) for step in steps]
        self._call(
            "load_steps",
            lambda rank: (
                [
                    [[step[i] for i in micro_batch] for micro_batch in layout.micro_batches[rank]]
                    for step, layout in zip(steps, self.layouts, strict=True)
                ],
            ),
        )

    def log_prob_sums(self, step: int, weights: str = "policy") -> Tensor:
        per_rank = self._call("log_prob_sums", lambda rank: (step, weights))
        return self._merge(step, per_rank)

    def record_old(self, step: int, entropy: bool = False) -> Tensor | None:
        per_rank = self._call("record_old", lambda rank: (step, entropy))
        return self._merge(step, per_rank) if entropy else None

    def log_ratios(self, step: int) -> list[Tensor]:
        per_rank = self._call("log_ratios", lambda rank: (step,))
        merged = self.layouts[step].merge(per_rank, self.num_samples[step])
        return [torch.tensor(row, dtype=torch.float64) for row in merged]

    def apply(self, step: int, terms: StepTerms) -> StepReport:
        layout = self.layouts[step]
        return merge_reports(
            self._call("apply", lambda rank: (step, rank_terms(terms, layout, rank))), layout, self.num_samples[step]
        )

    def update_anchor(self, beta: float) -> None:
        self._call("update_anchor", lambda rank: (beta,))

    def save_checkpoint(self, tag: str, trainer_state: dict) -> None:
        self._call("save_checkpoint", lambda rank: (tag, {"trainer": trainer_state}))

    def trainer_state(self) -> dict:
        return self._call("get_checkpoint_states", lambda rank: ())[0].get("trainer", {})

    def save_model(self) -> None:
        self._call("save_model", lambda rank: ())

    def _merge(self, step: int, per_rank: list[list[float]]) -> Tensor:
        return torch.tensor(self.layouts[step].merge(per_rank, self.num_samples[step]), dtype=torch.float64)

    def _call(self, method: str, arguments) -> list:
        """Call every actor with arguments(rank) -> tuple; one result per rank."""
        duplicates = self.group.duplicate_actors
        refs = [getattr(actor, method).remote(*arguments(i // duplicates)) for i, actor in enumerate(self.actors)]
        return get_all(refs, self.timeout, f"the policy's {method}")[::duplicates]
