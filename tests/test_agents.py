"""Agents: turns in lockstep, what is trained of a conversation, and what an agent may get wrong."""

import asyncio
import contextlib
import random
import threading
import time
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from real_runs import AGENT
from transformers import AutoModelForCausalLM, AutoTokenizer

from openrlhf_apo.embedded.engine import EmbeddedEngine
from openrlhf_apo.errors import RewardFailure, RunError
from openrlhf_apo.ranks.micro_batch import MicroBatch
from openrlhf_apo.rewards import isolated
from openrlhf_apo.rewards.agent_file import load_agent
from openrlhf_apo.rewards.reward import Reward
from openrlhf_apo.trainer import agents
from openrlhf_apo.trainer.agents import AgentEngine, AgentReward
from openrlhf_apo.trainer.completions import Completion, Request
from openrlhf_apo.trainer.handles import SamplingSettings
from openrlhf_apo.trainer.length_penalty import LengthPenalty
from openrlhf_apo.trainer.samples import Prompt
from openrlhf_apo.trainer.scoring import Scorer

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

EOS = 1
SAMPLING = SamplingSettings(samples_per_prompt=2, temperature=1.0, top_p=1.0, max_new_tokens=8, max_len=40, seed=3)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


class ScriptedEngine:
    """Answers each request with up to five tokens drawn from its seed, and remembers the batches."""

    restarts = 0

    def __init__(self):
        self.batches: list[list[Request]] = []
        self.rested = 0

    def complete(self, requests):
        self.batches.append(requests)
        return [self.one(request) for request in requests]

    def one(self, request: Request) -> Completion:
        rng = random.Random(request.seed)
        ids = [rng.randrange(2, 30) for _ in range(rng.randrange(5))] + [EOS]
        cut = ids[: request.max_tokens]
        return Completion(cut, [-1.0 - t / 100 for t in range(len(cut))], truncated=cut != ids)

    def rest(self):
        self.rested += 1


def prompts(*labels: int) -> list[Prompt]:
    return [Prompt(g, f"{g}+{label}=", str(label), "d") for g, label in enumerate(labels)]


def converse(execute, tokenizer, *labels, settings=SAMPLING, timeout=5.0):
    """(samples, outcomes, engine) of conversations by `execute`, the coroutine function of an executor."""
    engine = ScriptedEngine()
    executor = execute if hasattr(execute, "execute") else SimpleNamespace(execute=execute)
    reward = AgentReward(executor, timeout)
    samples = AgentEngine(engine, tokenizer, reward).generate(prompts(*labels), settings)
    return samples, reward.outcomes, engine


def test_all_conversations_take_their_turns_together(agent_file, tokenizer):
    samples, outcomes, engine = converse(load_agent(agent_file), tokenizer, 0, 1, 2)
    assert [len(batch) for batch in engine.batches] == [6, 4, 2] and engine.rested == 1
    seeds = [request.seed for batch in engine.batches for request in batch]
    assert len(set(seeds)) == 12 and max(seeds) < 2**56
    assert [outcome.extra["turns"] for outcome in outcomes] == [1, 1, 2, 2, 3, 3]
    assert [sample.group_id for sample in samples] == [0, 0, 1, 1, 2, 2]
    again, _, _ = converse(load_agent(agent_file), tokenizer, 0, 1, 2)  # environments take another time
    assert again == samples
    alone, _, _ = converse(load_agent(agent_file), tokenizer, 0)
    assert alone == samples[:2]
    others, _, _ = converse(
        load_agent(agent_file), tokenizer, 0, settings=SamplingSettings(2, 1.0, 1.0, 8, 40, seed=4)
    )
    assert others[0].response_ids != samples[0].response_ids


def test_a_conversation_is_prompt_turns_and_feedback(agent_file, tokenizer):
    (sample, _), (outcome, _), engine = converse(load_agent(agent_file), tokenizer, 1)
    first, second = (engine.one(batch[0]) for batch in engine.batches)
    feedback, last = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" = 9\n", "12 "))
    assert sample.prompt_ids == tokenizer("0+1=", add_special_tokens=False)["input_ids"]
    assert sample.response_ids == first.ids + feedback + second.ids + last
    assert engine.batches[1][0].ids == sample.prompt_ids + first.ids + feedback  # with the token that ended the turn
    assert sample.own == [True] * len(first.ids) + [False] * 5 + [True] * len(second.ids) + [False] * 3
    assert sample.rollout_log_probs == first.log_probs + [0.0] * 5 + second.log_probs + [0.0] * 3
    assert sample.own_ids == first.ids + second.ids and sample.own_log_probs == first.log_probs + second.log_probs
    assert sample.length == len(first.ids) + len(second.ids)
    assert sample.response == f"{tokenizer.decode(first.ids)}⟦ = 9\n⟧{tokenizer.decode(second.ids)}⟦12 ⟧"
    assert not sample.truncated
    texts = (tokenizer.decode(first.ids[:-1]), tokenizer.decode(second.ids[:-1]))  # an agent sees no end of a turn
    digits = [sum(c.isdigit() for c in text) / 16 for text in texts]
    assert outcome == Reward(sum(digits), digits[-1], {"turns": 2.0})  # the rewards of all steps, the last score


def test_the_tensors_are_openrlhfs(agent_file, tokenizer):
    """Its own MultiTurnAgentExecutor beside an engine that answers alike, and its own way from there to tensors."""
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    settings = SamplingSettings(3, 1.0, 1.0, None, 24, seed=5)  # some do not fit
    samples, outcomes, engine = converse(load_agent(agent_file), tokenizer, 2, 1, settings=settings)
    assert {sample.truncated for sample in samples} == {True, False}
    turns = {tuple(request.ids): request for batch in engine.batches for request in batch}
    by_place = {}  # the requests of a conversation, in order
    for request in engine.batches[0]:
        by_place.setdefault(tuple(request.ids), []).append(request)
    assert turns

    class Upstream:
        def __init__(self, first):
            self.request = first

        async def generate(self, ids, params, multi_modal_data=None):
            if self.request is None:  # the one whose context goes on from ours
                self.request = turns[tuple(ids)]
            answer = engine.one(self.request._replace(max_tokens=params.max_tokens))
            self.request = None
            text = tokenizer.decode(answer.ids if answer.truncated else answer.ids[:-1])
            log_probs = [{t: SimpleNamespace(logprob=v)} for t, v in zip(answer.ids, answer.log_probs, strict=True)]
            reason = "length" if answer.truncated else "stop"
            output = SimpleNamespace(token_ids=answer.ids, text=text, logprobs=log_probs, finish_reason=reason)
            return SimpleNamespace(outputs=[output])

    executor = load_agent(agent_file)
    rows = [
        (prompt, first) for prompt in prompts(2, 1) for first in by_place[tuple(tokenizer(prompt.text)["input_ids"])]
    ]
    for (prompt, first), sample, earned in zip(rows, samples, outcomes, strict=True):
        params = SimpleNamespace(max_tokens=None, logprobs=1)
        made = asyncio.run(
            executor.execute(prompt.text, prompt.label, params, settings.max_len, tokenizer, Upstream(first))
        )
        want = SamplesGenerator._process_response_into_experience(None, made, max_len=settings.max_len)
        got = MicroBatch.of([sample], 0)
        assert torch.equal(got.sequences, want.sequences)
        assert torch.equal(got.action_mask, want.action_mask)
        assert torch.equal(got.rollout_log_probs, want.rollout_log_probs)
        assert [earned.value] == want.rewards.tolist() and [earned.score] == want.scores.tolist()
        assert sample.truncated == (want.truncated.item() or want.info["response_clip_ratio"].item())


def test_an_executor_may_ask_as_it_likes(tokenizer):
    """Two turns at once, one after the other, with another temperature and limit."""

    async def execute(prompt, label, sampling_params, max_length, hf_tokenizer, llm_engine, images=None):
        ids = hf_tokenizer(prompt)["input_ids"]
        cold = deepcopy(sampling_params)
        cold.temperature, cold.max_tokens = 0.5, 2
        one, other = await asyncio.gather(llm_engine.generate(ids, sampling_params), llm_engine.generate(ids, cold))
        best = max(one, other, key=lambda output: len(output.outputs[0].token_ids)).outputs[0]
        tokens = ids + best.token_ids
        log_probs = [p[t].logprob for p, t in zip(best.logprobs, best.token_ids, strict=True)]
        return {
            "observation_tokens": tokens,
            "action_ranges": [(len(ids), len(tokens))],
            "rollout_log_probs": [0.0] * len(ids) + log_probs,
            "reward": 1,
        }

    samples, outcomes, engine = converse(execute, tokenizer, 0, 0)
    (batch,) = engine.batches
    assert len(batch) == 8 and {(r.temperature, r.max_tokens) for r in batch} == {(1.0, 8), (0.5, 2)}
    assert outcomes == [Reward(1.0)] * 4
    assert all(sample.own is None and sample.response_ids for sample in samples)


async def _raises(**_):
    raise KeyError("tool")


async def _nothing(**_):
    return None


async def _hangs(**_):
    await asyncio.sleep(60)


async def _no_action(**_):
    return {"observation_tokens": [1, 2], "action_ranges": [], "rollout_log_probs": [0.0, 0.0], "reward": 1.0}


async def _without_log_probs(**_):
    return {"observation_tokens": [1, 2], "action_ranges": [(1, 2)], "rollout_log_probs": None, "reward": 1.0}


async def _beyond(**_):
    return {"observation_tokens": [1, 2], "action_ranges": [(1, 3)], "rollout_log_probs": [0.0, 0.0], "reward": 1.0}


async def _no_reward(**_):
    return {"observation_tokens": [1, 2], "action_ranges": [(1, 2)], "rollout_log_probs": [0.0, 0.0]}


async def _nan(**_):
    return await _no_reward() | {"reward": torch.tensor(float("nan"))}


async def _stop_string(sampling_params, **_):
    sampling_params.stop = ["</tool>"]


async def _other_params(llm_engine, **_):
    await llm_engine.generate([5], SimpleNamespace(max_tokens=3))


async def _no_room(llm_engine, sampling_params, **_):
    await llm_engine.generate([5] * 40, sampling_params)


async def _other_thread(llm_engine, sampling_params, **_):
    await asyncio.to_thread(lambda: asyncio.run(llm_engine.generate([5], sampling_params)))


async def _exits(**_):
    raise SystemExit(3)


@pytest.mark.parametrize(
    "execute, message",
    [
        (_raises, "raised KeyError: 'tool'"),
        (_nothing, "returned None, and no dict"),
        (_hangs, "took more than 0.5 s"),
        (_no_action, "without a token of the policy's"),
        (_without_log_probs, "returned 0 rollout_log_probs for 2 observation_tokens"),
        (_beyond, "an action range from 1 to 3, of 2 tokens"),
        (_no_reward, "instead of {'rewards': ...}"),
        (_nan, "is nan"),
        (_stop_string, "raised AttributeError: 'SamplingParams' object has no attribute 'stop'"),
        (_other_params, "with a SimpleNamespace: hand on the sampling_params of execute"),
        (_no_room, "where --data.max_len 40 leaves no room"),
        (_other_thread, "from another thread or event loop than its conversation's"),
        (_exits, "raised SystemExit: 3"),
    ],
)
def test_what_an_agent_does_wrong_costs_a_failure_and_the_group(tokenizer, agent_file, execute, message):
    good = load_agent(agent_file)

    async def mixed(**asked):
        return await (execute(**asked) if asked["label"] == "7" else good.execute(**asked))

    samples, outcomes, _ = converse(mixed, tokenizer, 0, 7, 1, timeout=0.5)
    assert [isinstance(outcome, RewardFailure) for outcome in outcomes] == [False] * 2 + [True] * 2 + [False] * 2
    assert message in str(outcomes[2]) and str(outcomes[2]).startswith("is missing: the agent ")
    reward = AgentReward(good, 1.0)
    reward.outcomes = outcomes
    scorer = Scorer(reward, max_failures=2)
    assert [sample.group_id for sample in scorer.score(samples)] == [0, 0, 2, 2]
    assert scorer.failures == 2
    with pytest.raises(RunError, match="2 rewards failed, and --reward.max_failures is 1") as error:
        Scorer(reward, max_failures=1).score(samples)
    assert "\n" not in str(error.value)


def test_an_agent_that_blocks_the_thread_stops_the_run(tokenizer, monkeypatch):
    monkeypatch.setattr(agents, "GRACE", 0.1)
    free = threading.Event()

    async def execute(**_):
        free.wait(30)

    with pytest.raises(RunError, match="without an await"):
        converse(execute, tokenizer, 0, timeout=0.1)
    free.set()


def test_the_time_of_a_conversation_is_that_of_its_environment_alone(tokenizer, agent_file):
    class Slow(ScriptedEngine):
        def complete(self, requests):
            time.sleep(0.6)
            return super().complete(requests)

    reward = AgentReward(load_agent(agent_file), 0.5)
    AgentEngine(Slow(), tokenizer, reward).generate(prompts(1), SAMPLING)
    assert not any(isinstance(outcome, RewardFailure) for outcome in reward.outcomes)


@pytest.mark.parametrize("attempts", [1, 2])
def test_an_agent_may_give_up_on_a_turn_and_ask_again(tokenizer, attempts):
    class SlowAtFirst(ScriptedEngine):
        def complete(self, requests):
            time.sleep(0 if self.batches else 0.6)
            return super().complete(requests)

    async def execute(prompt, sampling_params, hf_tokenizer, llm_engine, **_):
        ids = hf_tokenizer(prompt)["input_ids"]
        for _ in range(attempts):
            with contextlib.suppress(TimeoutError):
                output = await asyncio.wait_for(llm_engine.generate(ids, sampling_params), 0.4)
                (turn,) = output.outputs
                return {
                    "observation_tokens": ids + turn.token_ids,
                    "action_ranges": [(len(ids), len(ids) + len(turn.token_ids))],
                    "rollout_log_probs": [0.0] * len(ids) + [-1.0] * len(turn.token_ids),
                    "reward": 1,
                }
        raise RuntimeError("the policy is too slow")

    engine, reward = SlowAtFirst(), AgentReward(SimpleNamespace(execute=execute), 5.0)
    AgentEngine(engine, tokenizer, reward).generate(prompts(0, 0), SAMPLING)
    assert len(engine.batches) == attempts
    assert [isinstance(outcome, RewardFailure) for outcome in reward.outcomes] == [attempts == 1] * 4


def test_a_length_penalty_counts_the_tokens_of_the_policy(agent_file, tokenizer):
    (sample, _), _, _ = converse(load_agent(agent_file), tokenizer, 1)
    sample.reward = 0.0
    assert LengthPenalty(sample.length, overlong_buffer=1.0)(sample) == -1.0
    assert LengthPenalty(sample.length + 1, overlong_buffer=1.0)(sample) == 0.0


def test_the_embedded_engine_completes_each_request_as_if_it_were_alone(tiny_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    engine = EmbeddedEngine(model, tokenizer)
    asked = [
        Request([4 + k] * (1 + 3 * k % 7), 10 + k, (1.0, 0.5, 0.0)[k % 3], (1.0, 0.9)[k % 2], 3 + k) for k in range(8)
    ]
    together = engine.complete(asked)
    for request, got in zip(asked, together, strict=True):
        (alone,) = engine.complete([request])
        assert alone.ids == got.ids and len(got.ids) <= request.max_tokens
        assert got.truncated == (got.ids[-1] not in engine.stop_ids)
        logits = model(torch.tensor([request.ids + got.ids])).logits[0, len(request.ids) - 1 : -1]
        if request.top_p == 1 and request.temperature > 0:
            log_probs = (logits / request.temperature).log_softmax(-1)
            want = log_probs.gather(-1, torch.tensor(got.ids)[:, None])[:, 0]
            assert got.log_probs == pytest.approx(want.tolist(), abs=1e-5)
        if request.temperature == 0:
            assert got.ids == logits.argmax(-1).tolist()


def test_files_of_rewards_and_agents_may_hold_dataclasses_with_annotations_as_text(tmp_path):
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    head += "@dataclass\nclass Tool:\n    n: int = 2\n"
    (tmp_path / "agent.py").write_text(head + AGENT)
    assert load_agent(str(tmp_path / "agent.py"))
    reward = "def reward_func(queries, prompts, labels, **kwargs):\n    return {'rewards': [Tool().n]}\n"
    (tmp_path / "reward.py").write_text(head + reward)
    assert isolated.load(str(tmp_path / "reward.py"))("1+1=2", "1+1=", "2") == ({"rewards": [2]}, None)
