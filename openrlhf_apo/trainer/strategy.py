"""OpenRLHF's DeepSpeed strategy with the two settings that group objectives and CPUs need."""

from openrlhf.utils.deepspeed import DeepspeedStrategy

from openrlhf_apo.cpu import has_cuda


class ApoStrategy(DeepspeedStrategy):
    def __init__(self, args, *, unmanaged_accumulation: bool):
        super().__init__(
            seed=args.train.seed,
            full_determinism=args.train.full_determinism_enable,
            max_norm=args.actor.max_norm,
            micro_train_batch_size=args.train.micro_batch_size,
            train_batch_size=args.train.batch_size,
            zero_stage=args.ds.zero_stage,
            args=args,
        )
        self.unmanaged_accumulation = unmanaged_accumulation

    def get_ds_train_config(self, optim_dict=None, **settings):
        if optim_dict is not None and not has_cuda():
            optim_dict["params"]["torch_adam"] = True  # FusedAdam and DeepSpeedCPUAdam compile C++ at first use
        config = super().get_ds_train_config(optim_dict, **settings)
        if self.unmanaged_accumulation:
            # The coefficients carry the normaliser, and step() is the boundary: any number of micro-batches of any
            # size makes one optimizer step, and DeepSpeed divides by nothing.
            del config["train_batch_size"]
            config["train_micro_batch_size_per_gpu"] = 1
            config["gradient_accumulation_steps"] = 1
            config["managed_gradient_accumulation"] = False
        return config

    def get_ds_eval_config(self, offload=False):
        config = super().get_ds_eval_config(offload)
        if self.unmanaged_accumulation:  # a frozen model takes micro-batches of any size too
            del config["train_batch_size"]
            config["train_micro_batch_size_per_gpu"] = 1
            config["gradient_accumulation_steps"] = 1
        return config
