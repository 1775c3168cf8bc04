"""APO in a PyTorch loop of your own: transformers samples, a function scores, and the loss is a tensor.

python -m openrlhf_apo.data.tiny --out .cache/tiny
python examples/python/plain_torch_loop.py

Only the objective and the log-probs are this package's. The reward goes from 0.5 to 0.8 in about a minute on one core.
"""

import json
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from openrlhf_apo.objectives import AlphaDivergenceLoss, GroupTargetBuilder
from openrlhf_apo.ranks.log_probs import response_log_probs

G, P = 16, 8  # prompts of a rollout, answers of each
EPOCHS = 2  # optimizer steps on a rollout's answers; the anchor is the policy that sampled them


def score(response: str, label: str) -> float:
    return float(f"boxed{{{label}}}" in response)


def main(folder: str = ".cache/tiny", rollouts: int = 20) -> list[float]:
    """Mean reward of each rollout."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/model", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
    rows = [json.loads(line) for line in Path(f"{folder}/train.jsonl").read_text().splitlines()][: 4 * G]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    target, loss_of = GroupTargetBuilder(beta_r=1.0), AlphaDivergenceLoss(tau_anc=0.8)
    means = []
    for rollout in range(rollouts):
        batch = [rows[(rollout * G + i) % len(rows)] for i in range(G)]
        chats = [[{"role": "user", "content": row["prompt"]}] for row in batch]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        prompts = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        tokens = model.generate(  # [G P, T]; top_k=0: from the policy itself, and not from its 50 likeliest tokens
            **prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=24, num_return_sequences=P
        )
        answers = tokens[:, prompts.input_ids.shape[1] :]  # [G P, T']
        ends = answers == tokenizer.eos_token_id
        kept = ends.cumsum(-1) - ends.long() == 0  # up to the first end, which was sampled too
        asked = prompts.attention_mask.bool().repeat_interleave(P, 0)  # [G P, T - T']
        labels = [row["label"] for row in batch for _ in range(P)]
        responses = [tokenizer.decode(answer[keep]) for answer, keep in zip(answers, kept, strict=True)]
        rewards = torch.tensor([score(*pair) for pair in zip(responses, labels, strict=True)]).view(G, P)
        means.append(rewards.mean().item())

        # generate pads prompts on the left; here padding goes to the end, where no token sees it.
        real = torch.cat([asked, kept], -1)
        sampled = torch.cat([torch.zeros_like(asked), kept], -1)
        sequences = pad_sequence([row[keep] for row, keep in zip(tokens, real, strict=True)], True)
        attention = pad_sequence([torch.ones(int(n)) for n in real.sum(-1)], True)
        actions = pad_sequence([row[keep][1:].float() for row, keep in zip(sampled, real, strict=True)], True)

        log_q = target(rewards)  # [G, P]
        anchor = None
        for _ in range(EPOCHS):
            log_probs, _ = response_log_probs(model, sequences, attention, actions)
            log_pi = log_probs.double().sum(-1).view(G, P)
            anchor = log_pi.detach() if anchor is None else anchor
            loss = loss_of(log_pi - anchor, log_q, alpha=0.6).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        print(f"rollout {rollout + 1}: reward {means[-1]:.3f}, loss {loss.item():.4f}", flush=True)
    return means


if __name__ == "__main__":
    main()
