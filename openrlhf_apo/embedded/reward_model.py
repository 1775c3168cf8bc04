"""A reward model in this process: transformers' sequence regression with the weights that OpenRLHF saves.

OpenRLHF's reward model (openrlhf/models/model.py) is a decoder with a head of one output, without bias, whose value
at the last token is the reward. transformers' classes of that form call the head `score`.
"""

import re
from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from openrlhf_apo import cpu
from openrlhf_apo.errors import OptionError
from openrlhf_apo.ranks.micro_batch import pad_right
from openrlhf_apo.trainer.layout import MicroBatchLimit, make_layout


class EmbeddedRewardModel:
    """model: has a head `score`. normalize: rewards less the configuration's `mean`, over its `std`."""

    def __init__(self, model: PreTrainedModel, normalize: bool, limit: MicroBatchLimit):
        self.model, self.limit = model.eval(), limit
        self.mean, self.std = (model.config.mean, model.config.std) if normalize else (0.0, 1.0)

    @torch.no_grad()
    def rate(self, sequences: list[list[int]]) -> list[float]:
        layout = make_layout(list(map(len, sequences)), 1, self.limit)
        rewards: list[float] = []
        for indices in layout.micro_batches[0]:
            ids, mask = (each.to(self.model.device) for each in pad_right([sequences[i] for i in indices]))  # [B, T]
            hidden = self.model.base_model(ids, attention_mask=mask, position_ids=mask.cumsum(-1) - 1)
            last = hidden.last_hidden_state[torch.arange(len(ids)), mask.sum(-1) - 1]  # [B, H]
            rewards += ((self.model.score(last)[:, 0] - self.mean) / self.std).tolist()
        return layout.merge([rewards], len(sequences))


def load_reward_model(args: SimpleNamespace, limit: MicroBatchLimit) -> EmbeddedRewardModel:
    """--reward.model_name_or_path. args: OpenRLHF's settings. Raises OptionError for a model of another form."""
    path = args.reward.model_name_or_path
    common = {"trust_remote_code": args.actor.trust_remote_code, "num_labels": 1}
    config = AutoConfig.from_pretrained(path, **common)
    prefix = config.to_dict().get("value_head_prefix", args.ds.value_head_prefix)
    model, found = AutoModelForSequenceClassification.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation=args.ds.attn_implementation,
        key_mapping=None if prefix == "score" else {rf"^{re.escape(prefix)}\.": "score."},
        output_loading_info=True,
        **common,
    )
    if found["missing_keys"]:
        raise OptionError(
            f"--reward.model_name_or_path {path} cannot be loaded in this process, it lacks "
            f"{', '.join(sorted(found['missing_keys'])[:3])}: use --runtime ray"
        )
    return EmbeddedRewardModel(model.to("cuda" if cpu.has_cuda() else "cpu"), args.reward.normalize_enable, limit)
