"""From a plan and the handles of a started policy and engine to a trainer."""

import json
import logging
import os
import sys
from dataclasses import asdict
from functools import partial
from typing import TextIO

from openrlhf_apo.errors import DataError, RunError
from openrlhf_apo.trainer.checkpoint_folder import CheckpointFolder
from openrlhf_apo.trainer.checkpoints import Checkpoints, Stateful
from openrlhf_apo.trainer.evaluation import Evaluation
from openrlhf_apo.trainer.group_objective import GroupObjective, GroupPlan
from openrlhf_apo.trainer.handles import EngineHandle, PolicyHandle
from openrlhf_apo.trainer.loop import RolloutUpdate, Trainer
from openrlhf_apo.trainer.metrics import MetricsFile
from openrlhf_apo.trainer.model_card import write_model_card
from openrlhf_apo.trainer.plan import RunPlan
from openrlhf_apo.trainer.prompts import PromptRow, PromptStream
from openrlhf_apo.trainer.resume import digest
from openrlhf_apo.trainer.rollout_files import RolloutFiles
from openrlhf_apo.trainer.rollouts import EngineRollouts, FileRollouts, Rollouts
from openrlhf_apo.trainer.sample_file import SampleFile
from openrlhf_apo.trainer.scoring import Scorer
from openrlhf_apo.trainer.stop import StopSignals
from openrlhf_apo.trainer.token_objective import TokenObjective
from openrlhf_apo.trainer.update import Update

logger = logging.getLogger(__name__)


class Inputs:
    """What a run reads, before anything is started: prompts or saved rollouts, held-out prompts, and the reward.

    Raises DataError for data that does not make one rollout.
    """

    def __init__(self, plan: RunPlan, rows: list[PromptRow] | None, held_out: list[PromptRow] | None, scorer: Scorer):
        schedule, self.held_out, self.scorer = plan.schedule, held_out, scorer
        self.prompts: PromptStream | None = None
        self.saved: RolloutFiles | None = None
        if plan.saved_rollouts:
            self.saved = RolloutFiles(plan.saved_rollouts)
            per_rollout = [schedule.prompts_per_rollout] * len(self.saved)
        else:
            assert rows is not None
            self.prompts = PromptStream(rows, schedule.seed, schedule.episodes)
            if len(self.prompts) < schedule.prompts_per_rollout:
                raise DataError(
                    f"{len(rows)} prompts x {schedule.episodes} episodes are fewer than one --rollout.batch_size "
                    f"({schedule.prompts_per_rollout})"
                )
            full, rest = divmod(len(rows), schedule.prompts_per_rollout)
            per_rollout = ([schedule.prompts_per_rollout] * full + [rest] * (rest > 0)) * schedule.episodes
        self.rollouts = len(per_rollout)
        self.optimizer_steps = schedule.optimizer_steps(per_rollout)
        # Of the prompts with their labels, or of saved rollouts by the sizes of their files.
        content = self.saved.sizes() if self.saved else [asdict(row) for row in rows or ()]
        flag = "apo.load_rollouts" if self.saved else "data.prompt_dataset"
        # Of the run, for its checkpoints.
        self.manifest = plan.manifest | {flag: digest(json.dumps(content, default=str).encode())}


def assemble(
    plan: RunPlan,
    inputs: Inputs,
    policy: PolicyHandle,
    engine: EngineHandle | None,
    vocab_size: int,
    *,
    resume: bool = False,
    foreign_update: RolloutUpdate | None = None,
    trackers: list | None = None,
    console: TextIO = sys.stderr,
    stop: StopSignals | None = None,
) -> Trainer:
    """A trainer. resume: it goes on from the checkpoint that the policy has loaded. foreign_update: what trains on a
    rollout in place of an objective of ours (`--loss openrlhf`)."""
    objective: GroupObjective | TokenObjective | None = None
    own_update = None
    if plan.objective is None:
        assert foreign_update is not None
        update = foreign_update
    else:
        if isinstance(plan.objective, GroupPlan):
            objective = GroupObjective(policy, plan.objective, vocab_size, plan.behavior)
        else:
            objective = TokenObjective(policy, plan.objective, plan.behavior)
        own_update = Update(
            policy,
            objective,
            groups_per_step=plan.schedule.groups_per_step,
            epochs=plan.schedule.epochs,
            regularizer=plan.regularizer,
            length_penalty=plan.length_penalty,
            correction=plan.correction,
            behavior=plan.behavior,
        )
        update = own_update.run
    if inputs.saved is not None:
        rollouts: Rollouts = FileRollouts(inputs.saved)
    else:
        assert inputs.prompts is not None and engine is not None
        save_to = RolloutFiles(plan.save_rollouts) if plan.save_rollouts else None
        if save_to is not None and not resume:
            save_to.leave_alone()
        rollouts = EngineRollouts(
            inputs.prompts,
            plan.schedule.prompts_per_rollout,
            plan.sampling,
            engine,
            inputs.scorer,
            save_to,
            plan.group_filter,
            plan.max_generations,
            plan.guidance,
            plan.generate_batch,
        )
    evaluation = None
    if plan.evaluation is not None:
        assert inputs.held_out is not None
        evaluation = Evaluation(inputs.held_out, plan.evaluation.sampling, plan.evaluation.every, plan.evaluation.ends)
    output = plan.output
    folder = None
    if output.resumable:
        folder = CheckpointFolder(
            output.checkpoints, output.max_checkpoints, output.max_checkpoints_gb, inputs.manifest
        )
    checkpoints = Checkpoints(policy, folder, output.save_every, output.best_key)
    parts: dict[str, Stateful | None] = {
        "scorer": inputs.scorer,
        "prompts": inputs.prompts,
        "rollouts": rollouts if isinstance(rollouts, EngineRollouts) else None,
        "objective": objective,
        "update": own_update if plan.asynchronous else None,
        "kl": plan.regularizer.controller,
        "guidance": plan.guidance,
        "health": plan.health,
    }
    state = {name: part for name, part in parts.items() if part is not None}
    done = _resume(policy, state | {"checkpoints": checkpoints}) if resume else 0
    if isinstance(rollouts, EngineRollouts) and rollouts.ready and not plan.asynchronous:
        raise RunError("the checkpoint holds a rollout that was sampled ahead: resume it with --train.async_enable")
    checkpoints.newest = done or None  # asked to end at once, a resumed run has it already, and leaves it alone
    return Trainer(
        policy=policy,
        engine=engine,
        rollouts=rollouts,
        update=update,
        group_size=plan.schedule.group_size,
        scorer=inputs.scorer,
        evaluation=evaluation,
        checkpoints=checkpoints,
        metrics=MetricsFile(os.path.join(output.directory, "metrics.jsonl"), done or None),
        samples=SampleFile(output.directory, done or None),
        write_card=partial(write_model_card, plan),
        trackers=trackers or [],
        health=plan.health,
        restarts=plan.restarts,
        console=console,
        stop=stop or StopSignals(),
        track_every=output.track_every,
        averages=plan.ema is not None,
        ahead=plan.asynchronous,
        check_every_sync=plan.check_every_sync,
        state=state,
        done=done,
    )


def _resume(policy: PolicyHandle, parts: dict[str, Stateful]) -> int:
    """Load the parts' states from the policy's checkpoint; the number of rollouts that are already done."""
    loaded = policy.trainer_state()
    if missing := [name for name in parts if name not in loaded]:
        raise RunError(
            f"the checkpoint has no state of {', '.join(missing)}: resume with the version and flags that wrote it, "
            "or start anew in another --ckpt.path"
        )
    for name, part in parts.items():
        part.load_state_dict(loaded[name])
    logger.info("resuming after rollout %d", loaded["step"])
    return loaded["step"]
