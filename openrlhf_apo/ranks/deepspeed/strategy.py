"""OpenRLHF's DeepSpeed strategy with the two settings that group objectives and CPUs need."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from deepspeed.module_inject.layers import GatherReplacedLayerParams
from deepspeed.runtime.zero import GatheredParameters
from openrlhf.models import Actor
from openrlhf.utils.deepspeed import DeepspeedStrategy
from openrlhf.utils.distributed_util import torch_dist_barrier_and_cuda_sync
from peft import PeftModel
from torch import nn
from torch.nn import Parameter

from openrlhf_apo.cpu import has_cuda
from openrlhf_apo.ranks.deepspeed.plain_checkpoints import PlainCheckpoints
from openrlhf_apo.ranks.lora import save_trained
from openrlhf_apo.trainer.handles import Behavior


@dataclass(frozen=True)
class RankPlan:
    """What a rank keeps beside the policy. anchor, reference: second sets of weights; shared: they are one and the
    same. ema: the share of its old value that a moving average of the policy keeps at each step; None: there is
    none. behavior: whose log-probs are those of π_old."""

    anchor: bool = False
    reference: bool = False
    shared: bool = False
    ema: float | None = None
    kl_estimator: str = "k3"
    entropy: bool = False  # of each token, in every training forward
    behavior: Behavior = "policy"


class ApoStrategy(DeepspeedStrategy):
    """plan: None for `--loss openrlhf`, where gradients accumulate as OpenRLHF counts them. resume: the name of the
    checkpoint to go on from, None to start anew."""

    def __init__(self, args, plan: RankPlan | None, resume: str | None = None):
        super().__init__(
            seed=args.train.seed,
            full_determinism=args.train.full_determinism_enable,
            max_norm=args.actor.max_norm,
            micro_train_batch_size=args.train.micro_batch_size,
            train_batch_size=args.train.batch_size,
            zero_stage=args.ds.zero_stage,
            args=args,
        )
        self.plan, self.resume = plan, resume

    def load_ckpt(self, model, load_dir, **settings):
        # DeepSpeed would take the one that its file `latest` names, and go on without a word where there is none.
        if self.resume is None:
            return None, {}
        model.checkpoint_engine = PlainCheckpoints(model._config)
        strict = not isinstance(model.module, PeftModel)  # whose checkpoint has the adapter alone
        return super().load_ckpt(model, load_dir, tag=self.resume, load_module_strict=strict, **settings)

    def save_ckpt(self, model, save_dir, tag=None, max_num=3, max_mem=1000, client_state=None, **_):
        # DeepSpeed's files alone. The driver says when they are complete, and removes older checkpoints after that;
        # OpenRLHF removes them first.
        model.save_checkpoint(
            save_dir,
            tag=tag,
            client_state=client_state,
            save_latest=False,
            exclude_frozen_parameters=isinstance(model.module, PeftModel),
        )

    def save_model(self, model: Actor, tokenizer, output_dir: str, **settings) -> None:
        """With LoRA the adapter or, as asked, the whole model, under any ZeRO stage; OpenRLHF's own gathers the whole
        model for an adapter."""
        module = self._unwrap_model(model)
        if not isinstance(module, PeftModel):
            super().save_model(model, tokenizer, output_dir, **settings)
            return
        gathered = partial(self.gathered, module)
        save_trained(module, output_dir, self.args.ckpt.merge_lora, gathered, writes=self.is_rank_0())
        if self.is_rank_0():
            tokenizer.save_pretrained(output_dir)
        torch_dist_barrier_and_cuda_sync()

    @contextmanager
    def gathered(self, module: nn.Module, weights: Iterable[Parameter]) -> Iterator[None]:
        """Weights of the module are whole on every rank meanwhile. All ranks together."""
        # One by one: of several, DeepSpeed waits for the last alone (partition_parameters.py:2082), which gloo may
        # finish first; and tensor parallelism gathers weights of one layer at a time.
        with ExitStack() as stack:
            for weight in weights:
                if self.ds_tensor_parallel_size > 1:
                    gathered = GatherReplacedLayerParams([weight], module, enabled=True)
                else:
                    gathered = GatheredParameters([weight], enabled=self.stage == 3)
                stack.enter_context(gathered)
            yield

    @property
    def clips_before_the_optimizer(self) -> bool:
        """Whether the backend clips in DeepSpeed's place: in float32 without ZeRO it clips, and does not say the
        norm."""
        return self.plan is not None and self.stage == 0 and self.param_dtype == "fp32"

    def get_ds_train_config(self, optim_dict=None, **settings):
        # ZeRO-3 takes the states of no other Adam than DeepSpeed's off the GPU (stage3.py:3584).
        sleeps = self.stage == 3 and self.args.ds.enable_sleep
        if optim_dict is not None and not self.adam_offload and not sleeps:
            # torch's own: DeepSpeed's FusedAdam and DeepSpeedCPUAdam compile C++ at first use, and need a toolkit.
            fused = {"fused": True} if has_cuda() and optim_dict["type"] == "AdamW" else {}
            optim_dict["params"] |= {"torch_adam": True} | fused
        config = super().get_ds_train_config(optim_dict, **settings)
        if self.clips_before_the_optimizer:
            config["gradient_clipping"] = 0.0
        if self.plan is not None:
            # The coefficients carry the normaliser, and step() is the boundary: any number of micro-batches of any
            # size makes one optimizer step, and DeepSpeed divides by nothing.
            config = _one_micro_batch(config) | {"managed_gradient_accumulation": False}
        return config

    def get_ds_eval_config(self, offload=False):
        config = super().get_ds_eval_config(offload)
        return config if self.plan is None else _one_micro_batch(config)  # a frozen model takes any size too


def _one_micro_batch(config: dict) -> dict:
    """The configuration without a global batch size to divide: one micro-batch is one DeepSpeed step."""
    kept = {key: value for key, value in config.items() if key != "train_batch_size"}
    return kept | {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
