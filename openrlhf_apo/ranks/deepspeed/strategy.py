"""OpenRLHF's DeepSpeed strategy with the two settings that group objectives and CPUs need."""

from dataclasses import dataclass

from openrlhf.utils.deepspeed import DeepspeedStrategy

from openrlhf_apo.cpu import has_cuda
from openrlhf_apo.ranks.deepspeed.plain_checkpoints import PlainCheckpoints


@dataclass(frozen=True)
class RankPlan:
    """What a rank keeps beside the policy. anchor, reference: second sets of weights; shared: they are one and the
    same. ema: the share of its old value that a moving average of the policy keeps at each step; None: there is
    none."""

    anchor: bool = False
    reference: bool = False
    shared: bool = False
    ema: float | None = None
    kl_estimator: str = "k3"
    entropy: bool = False  # of each token, in every training forward


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
        return super().load_ckpt(model, load_dir, tag=self.resume, **settings)

    def save_ckpt(self, model, save_dir, tag=None, max_num=3, max_mem=1000, client_state=None, **_):
        # DeepSpeed's files alone. The driver says when they are complete, and removes older checkpoints after that;
        # OpenRLHF removes them first.
        model.save_checkpoint(save_dir, tag=tag, client_state=client_state, save_latest=False)

    @property
    def clips_before_the_optimizer(self) -> bool:
        """Whether the backend clips in DeepSpeed's place: in float32 without ZeRO it clips, and does not say the
        norm."""
        return self.plan is not None and self.stage == 0 and self.param_dtype == "fp32"

    def get_ds_train_config(self, optim_dict=None, **settings):
        if optim_dict is not None and not self.adam_offload:
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
