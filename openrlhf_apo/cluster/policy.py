"""The policy as a group of Ray actors: OpenRLHF's PolicyModelActor with a Learner inside."""

import os
from collections.abc import Callable, Iterator
from functools import partial

from openrlhf.models import Actor
from openrlhf.trainer.ray.launcher import RayActorGroup
from openrlhf.trainer.ray.launcher import ReferenceModelActor as UpstreamReference
from openrlhf.trainer.ray.ppo_actor import PolicyModelActor as UpstreamPolicy
from ray.exceptions import RayError
from torch import Tensor

from openrlhf_apo.cluster.buckets import bounded_runs, bucket_bytes, pack
from openrlhf_apo.cluster.calls import get_all
from openrlhf_apo.errors import RunError
from openrlhf_apo.ranks.deepspeed.anchor_weights import AdapterAnchor, AnchorWeights
from openrlhf_apo.ranks.deepspeed.backend import DeepSpeedBackend
from openrlhf_apo.ranks.deepspeed.weight_average import WeightAverage, writable
from openrlhf_apo.ranks.engine_weights import engine_weights
from openrlhf_apo.ranks.learner import Learner
from openrlhf_apo.ranks.lora import Adapter
from openrlhf_apo.trainer.handles import EMA_FOLDER
from openrlhf_apo.trainer.layout import MicroBatchLimit
from openrlhf_apo.trainer.samples import Sample
from openrlhf_apo.trainer.sharded_policy import ShardedPolicy


class PolicyActor(UpstreamPolicy.__ray_metadata__.modified_class):
    """One rank. What `--loss openrlhf` needs is inherited; every other objective uses the learner."""

    def init_model_from_pretrained(self, strategy, pretrain, max_steps=None, vllm_engines=None):
        plan, self.anchor, self.ema = strategy.plan, None, None
        if plan is not None:
            strategy.args.train.enable_ema = False  # OpenRLHF's average is one more model, in the policy's dtype
        super().init_model_from_pretrained(strategy, pretrain, max_steps, vllm_engines)
        if plan is None:
            return
        if plan.ema is not None:
            self.ema = WeightAverage(self.actor, strategy.stage)
            if self.checkpoint_states:
                if "ema" not in self.checkpoint_states:
                    raise RunError("the checkpoint has no ema weights: resume with the flags that wrote it")
                self.ema.load_state_dict(self.checkpoint_states.pop("ema"))
        adapter, offload = None, strategy.args.ref.offload
        if strategy.args.ds.lora.rank:
            adapter = Adapter(self.actor.model.module, partial(writable, sharded=strategy.stage == 3))
        if plan.anchor and adapter:
            self.anchor = AdapterAnchor(self.actor, strategy.stage)
        elif plan.anchor:
            self.anchor = AnchorWeights(self._frozen_model(pretrain, plan.shared and offload), strategy.stage)
        if plan.anchor and self.checkpoint_states:
            if "anchor" not in self.checkpoint_states:
                raise RunError("the checkpoint has no anchor weights: resume with the flags that wrote it")
            self.anchor.load_state_dict(self.checkpoint_states.pop("anchor"))
        reference = None
        if plan.reference and adapter:
            reference = self.actor
        elif plan.reference:
            reference = self.anchor.model if plan.shared else self._frozen_model(pretrain, offload)
        backend = DeepSpeedBackend(
            *(strategy, self.actor, self.actor_scheduler, self.anchor, reference),
            adapter=adapter,
            ema=self.ema,
            ema_beta=plan.ema,
        )
        self.learner = Learner(backend, self.tokenizer.pad_token_id, plan.kl_estimator, plan.entropy, plan.behavior)

    def _frozen_model(self, pretrain, offload: bool = False) -> Actor:
        """The initial weights, sharded like the policy's. offload: to the host, from where a forward fetches them."""
        args = self.strategy.args
        model = Actor(
            pretrain,
            attn_implementation=args.ds.attn_implementation,
            experts_implementation=args.ds.experts_implementation,
            param_dtype=args.ds.param_dtype,
            ds_config=self.strategy.get_ds_eval_config(offload),
            packing_samples=args.ds.packing_samples,
            temperature=args.rollout.temperature,
            use_liger_kernel=args.ds.use_liger_kernel,
        )
        return self.strategy.prepare(model)

    def learn(self, method: str, *arguments):
        """Learner.method(*arguments)."""
        return getattr(self.learner, method)(*arguments)

    def save_checkpoint(self, tag, client_states):
        if self.anchor is not None:  # inside DeepSpeed's own file, so that the two cannot be torn apart
            client_states = client_states | {"anchor": self.anchor.state_dict()}
        if self.ema is not None:
            client_states = client_states | {"ema": self.ema.state_dict()}
        super().save_checkpoint(tag, client_states)
        if self.ema is not None and self.save_hf_ckpt:
            self._save_ema(os.path.join(self.strategy.args.ckpt.path, f"{tag}_hf"))

    def save_model(self):
        super().save_model()
        if self.ema is not None:
            self._save_ema(self.strategy.args.ckpt.output_dir)

    def _save_ema(self, beside: str) -> None:
        with self.ema.in_place_of(self.actor):
            self.strategy.save_model(self.actor, self.tokenizer, os.path.join(beside, EMA_FOLDER))

    def connect_engines(self, sender: type, *arguments) -> None:
        """sender: one of cluster.weight_sync's."""
        wanted = sender.every_rank or self.strategy.is_rank_0()
        self.sender = sender(*arguments) if wanted else None

    def send_weights(self) -> None:
        """All weights to the engines, one bucket after the other. Where an engine has died, the rank that met it still
        gathers every bucket with the others, which would wait for it, and raises then."""
        failure = None
        for weights in self._buckets():
            if self.sender is not None and (failure is None or self.sender.every_rank):
                try:
                    self.sender.send(*pack(weights, self.sender.device))
                except RayError as error:
                    failure = failure or error
        if failure is not None:
            raise failure

    def weight_sums(self) -> dict[str, tuple[float, float]] | None:
        """{name: (Σ w, Σ w²)} in float64 on rank 0, None elsewhere."""
        sums = {}
        for weights in self._buckets():
            if self.strategy.is_rank_0():
                sums |= {name: (w.double().sum().item(), w.double().square().sum().item()) for name, w in weights}
        return sums or None

    def _buckets(self) -> Iterator[list[tuple[str, Tensor]]]:
        """(name, whole weight) of consecutive weights, gathered while the caller looks at them; with LoRA as the base
        model names them, merged. All ranks together."""
        module, strategy = self.actor.model.module, self.strategy
        weights = engine_weights(module)
        whole = strategy.ds_tensor_parallel_size  # shards make one
        sharded = strategy.stage == 3
        sizes = [w.weight.ds_numel * w.weight.itemsize if sharded else w.nbytes * whole for w in weights]
        for run in bounded_runs(sizes, bucket_bytes()):
            bucket = weights[run.start : run.stop]
            with strategy.gathered(module, [part for each in bucket for part in each.parts]):
                yield [(each.name, each.merged()) for each in bucket]


class ReferenceActor(UpstreamReference.__ray_metadata__.modified_class):
    """OpenRLHF's reference model, for the KL term of `--loss openrlhf`. A class of this package, because importing the
    package is what prepares a worker process for OpenRLHF's."""


class RayPolicy(ShardedPolicy):
    """PolicyHandle over a RayActorGroup. Actors of one ring-attention or tensor-parallel group do the same work.
    sleeps: gradients and the optimizer's states are on the GPU only while a rollout is trained on
    (--ds.enable_sleep), as OpenRLHF has it; the actors start without."""

    def __init__(self, group: RayActorGroup, limit: MicroBatchLimit, timeout: float, sleeps: bool = False):
        self.group, self.timeout, self.sleeps = group, timeout, sleeps
        self.actors = group._actor_handlers
        super().__init__(len(self.actors) // group.duplicate_actors, limit)

    def call_ranks(self, method: str, arguments: Callable[[int], tuple]) -> list:
        duplicates = self.group.duplicate_actors
        refs = [actor.learn.remote(method, *arguments(i // duplicates)) for i, actor in enumerate(self.actors)]
        return get_all(refs, self.timeout, f"the policy's {method}")[::duplicates]

    def load_steps(self, steps: list[list[Sample]]) -> None:
        if self.sleeps:
            self.call_actors("reload_states")
        super().load_steps(steps)

    def sleep(self) -> None:
        """After training on a rollout."""
        if self.sleeps:
            self.call_actors("offload_states")

    def save_checkpoint(self, tag: str, trainer_state: dict) -> None:
        self.call_actors("save_checkpoint", tag, {"trainer": trainer_state})

    def trainer_state(self) -> dict:
        states = self.call_actors("get_checkpoint_states")[0]
        return states["trainer"] if states else {}

    def save_model(self) -> None:
        self.call_actors("save_model")

    def release_memory(self) -> None:
        """Give cached GPU memory back to the driver, for the engine on the same GPU."""
        self.call_actors("empty_cache")

    def call_actors(self, method: str, *arguments) -> list:
        """actor.method(*arguments) of every actor at once; one result per actor."""
        refs = [getattr(actor, method).remote(*arguments) for actor in self.actors]
        return get_all(refs, self.timeout, f"the policy's {method}")
