"""The training loop. A step: draw, roll out, balance and calibrate, update, sync, probe, record, checkpoint.

Every rank runs it. All ranks compute prompts, balance and packing from the same data, so the results agree. Each rank
rolls out its own groups and decodes its own images; only rank 0 sends weights and writes metrics.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec

from mmopd import catalog
from mmopd.algorithm.settings import Algorithm
from mmopd.config import Recipe
from mmopd.errors import ServerError
from mmopd.modality import Encoder
from mmopd.prompts import difficulty_counts
from mmopd.prompts.shards import Shards, open_mixture
from mmopd.prompts.tokens import hash_processor
from mmopd.records import Absent, Encoded, Outcome, Sample
from mmopd.report.model_card import model_card
from mmopd.rollout.collect import seed_of, version_of
from mmopd.rollout.sync import WeightSync, connect
from mmopd.runtime.run_folder import RunFolder
from mmopd.runtime.status import telling
from mmopd.runtime.time_limit import TimeLimit
from mmopd.runtime.watchdog import Watchdog
from mmopd.serving import endpoint
from mmopd.task.load import load_tasks
from mmopd.teacher import identity
from mmopd.teacher.router import load_teachers
from mmopd.train.batch import Batch, build_batch, minibatches
from mmopd.train.checkpoint import Checkpoints, load
from mmopd.train.clock import Clock
from mmopd.train.distributed import Ranks
from mmopd.train.export import export
from mmopd.train.held_out import HeldOut, mean_score
from mmopd.train.image_proof import prove_sight
from mmopd.train.recompute import recompute
from mmopd.train.recorder import Recorder
from mmopd.train.rollouts import Rollouts
from mmopd.train.skipped import SkippingUpdater
from mmopd.train.stream import Stream
from mmopd.train.trainer import Trainer
from mmopd.train.trainer_thread import TrainerThread
from mmopd.train.weight_probe import probe_items
from mmopd.train.weight_publisher import WeightPublisher


async def train(
    run: RunFolder, recipe: Recipe, ranks: Ranks, *, changed: Collection[str], stop: threading.Event, watchdog: Watchdog
) -> None:
    """Train from the last checkpoint of the run, or from the start, to the end; then export.

    Args:
        changed: sources that were added to or removed from the mixture on purpose since the checkpoint.
        stop: stop request. Once it is set on a rank, or the run has a file `stop`, or its time is nearly over, all
            ranks finish the current step, save a checkpoint and return without an export.
        watchdog: notified of all progress.

    Raises:
        ServerError: too many responses lack a score.
        UserError: the trainer does not see images, or too many updates were skipped.
        CheckpointError: the checkpoint is of other sources, or cannot be read.
        DataError: the content of a source has changed since the checkpoint.
        EngineError: the student's engine is lost permanently.
        ProbeError: engine and trainer disagree after a weight sync.
    """
    encoder = Encoder(recipe.student.model)
    stream = open_stream(run, recipe, encoder)
    trainer = open_trainer(recipe, encoder, ranks, watchdog, stream.sources)
    checkpoints = open_checkpoints(run, recipe)
    updater = SkippingUpdater(run, trainer)
    done = restore(checkpoints, trainer, stream, updater, changed)
    in_trainer_thread = TrainerThread(ranks, watchdog, ahead=recipe.rollout.async_steps > 0)
    link = connect_engines(run, recipe, ranks)
    held_out = HeldOut(
        run, recipe, stream.sources, encoder, ranks=ranks, done=done, stopping=partial(is_stopping, run, stop)
    )
    recorder = open_recorder(run, recipe, encoder, done) if ranks.rank == 0 else None
    async with open_rollouts(run, recipe, stream.sources, encoder, ranks) as rollouts:
        weight_publisher = WeightPublisher(
            trainer, rollouts.engines, link, probe_items(list(stream.sources.values()), encoder), in_trainer_thread
        )
        with (
            telling(run.status_of(f"rank{ranks.rank}"), partial(status_of, watchdog, rollouts)),
            link or nullcontext(),
            recorder or nullcontext(),
            held_out,
            watchdog,
            in_trainer_thread,
        ):
            watchdog.beat_with(asyncio.get_running_loop())
            await weight_publisher.publish(version_of(done), everything=True)
            await held_out.at_start(rollouts)
            clock = Clock(watchdog)
            limit = TimeLimit.of(run)
            next_rollout = None
            outcomes_since_checkpoint: list[Outcome] = []
            for step in range(done, recipe.train.steps):
                watchdog.beat(f"step {step}")
                last = step + 1 == recipe.train.steps
                with clock("rollout"):
                    rolling = next_rollout or rollouts.begin(step, stream.draw(step))
                    prompts, samples, seconds = await rollouts.finish(rolling, weight_publisher, stream.replace)
                    weight_publisher.sleep_engine()
                    stream.observe(prompts, samples)
                outcomes_since_checkpoint += [sample.outcome for sample in samples]
                stream.check_same(ranks)
                check_absent(samples, recipe.train.max_absent, step)
                state = {"step": step + 1} | stream.state()
                next_rollout = (
                    rollouts.begin(step + 1, stream.draw(step + 1)) if recipe.rollout.async_steps and not last else None
                )
                with clock("update"):
                    batch, updates, more = await in_trainer_thread(
                        learn, recipe, trainer, updater, samples, prompts, step=step
                    )
                with clock("sync"):
                    gap = await weight_publisher.publish(version_of(step + 1))
                held = await held_out.after(step, rollouts, clock, last=last)
                more |= {"probe": gap, "rollout_seconds": seconds} | scoring(rollouts.spent()) | stream.metrics() | held
                if recorder is not None:
                    recorder.step(step, prompts, samples, batch, updates=updates, more=more | clock.metrics())
                stopping = any(ranks.all_max([limit.is_over(*clock.step) or is_stopping(run, stop)]))
                clock = Clock(watchdog)  # checkpoint time is reported with the next step
                if (step + 1) % recipe.train.checkpoint_every == 0 or last or stopping:
                    with clock("checkpoint"):
                        checkpoints.save(
                            trainer,
                            step + 1,
                            state | {"skipped": updater.state()},
                            score_of(recipe, held, outcomes_since_checkpoint),
                        )
                        rollouts.kept.clear()
                        outcomes_since_checkpoint.clear()
                if stopping and not last:
                    return
            export(trainer, run.export, model_card(run))


def score_of(recipe: Recipe, held: Mapping[str, float], outcomes: Sequence[Outcome]) -> float | None:
    """Return the score of a checkpoint, by held-out rows where there are some; None if it has none."""
    if recipe.evaluate and recipe.evaluate.mixture:
        return mean_score(held)
    return share_right(outcomes, recipe.algorithm)


def is_stopping(run: RunFolder, stop: threading.Event) -> bool:
    """Return whether a signal or the run's file `stop` asks the ranks to end."""
    return stop.is_set() or run.stop.exists()


def status_of(watchdog: Watchdog, rollouts: Rollouts) -> dict[str, Any]:
    """Return what a rank does now, as JSON values."""
    return {"doing": watchdog.where, "pools": rollouts.status()}


def connect_engines(run: RunFolder, recipe: Recipe, ranks: Ranks) -> WeightSync[Any] | None:
    """Return the link over which rank 0 sends weights to the student's engines; None on other ranks."""
    if ranks.rank != 0:
        return None
    students, _ = endpoint.load_by_role(run.endpoints)
    return connect(recipe.student, students, recipe.train.timeout, ranks.device)


def open_stream(run: RunFolder, recipe: Recipe, encoder: Encoder) -> Stream:
    """Return the prompts of a run, from the first one.

    Raises:
        ConfigError: the mixture names an unknown task, or a task that its rows do not have.
        DataError: a source cannot be opened, or its difficulty was not measured.
    """
    mixture = catalog.load_mixture(recipe.mixture, key="mixture")
    sources = open_mixture(mixture, load_tasks(), Path.cwd(), hash_processor(recipe.student.model))
    measured = None
    if recipe.algorithm.difficulty is not None:
        measured = difficulty_counts.load(run.difficulty / difficulty_counts.FILE)
    return Stream(mixture, sources, encoder, prompts=recipe.rollout.prompts, seed=recipe.seed, measured=measured)


def open_recorder(run: RunFolder, recipe: Recipe, encoder: Encoder, done: int) -> Recorder:
    """Return the recorder of a run that continues after `done` steps."""
    return Recorder(run, recipe.algorithm, encoder, steps=recipe.train.steps, done=done)


def open_rollouts(
    run: RunFolder, recipe: Recipe, sources: Mapping[str, Shards], encoder: Encoder, ranks: Ranks
) -> Rollouts:
    """Return the source of a run's samples.

    Raises:
        ConfigError: a prompt has no teacher, or a teacher has no endpoint.
        DataError: (SFT) the teachers' answers are missing or cannot be used.
    """
    return Rollouts(
        run,
        sources,
        encoder,
        ranks,
        fleet=load_teachers(recipe.fleet, recipe.algorithm.objective),
        rollout=recipe.rollout,
        algorithm=recipe.algorithm,
        timeout=recipe.train.timeout,
        seed=recipe.seed,
    )


def open_checkpoints(run: RunFolder, recipe: Recipe) -> Checkpoints:
    """Return the checkpoints of a run; each has a copy of what the run knows of its teachers."""
    teachers = msgspec.to_builtins(identity.load(run.teachers))
    return Checkpoints(run.checkpoints, recipe.train.keep_checkpoints, recipe.train.keep_best, teachers=teachers)


def open_trainer(
    recipe: Recipe, encoder: Encoder, ranks: Ranks, watchdog: Watchdog, sources: Mapping[str, Shards]
) -> Trainer:
    """Return the trainer, which is proven to see what prompts show; each forward pass is progress to the watchdog.

    Raises:
        UserError: the trainer does not see images.
    """
    trainer = Trainer(recipe.student.model, encoder, recipe.train, recipe.algorithm, ranks)
    trainer.student.register_forward_pre_hook(lambda *_: watchdog.beat())
    prove_sight(trainer.logprobs, list(sources.values()), encoder)
    return trainer


def restore(
    checkpoints: Checkpoints, trainer: Trainer, stream: Stream, updater: SkippingUpdater, changed: Collection[str]
) -> int:
    """Restore trainer, stream and updater from the newest whole checkpoint; return its steps, 0 without one."""
    latest = checkpoints.latest()
    if latest is None:
        return 0
    state = load(trainer, latest)
    stream.restore(state, changed)
    updater.restore(state["skipped"])
    return int(state["step"])


def learn(
    recipe: Recipe,
    trainer: Trainer,
    updater: SkippingUpdater,
    samples: Sequence[Sample],
    prompts: Sequence[Encoded],
    *,
    step: int,
) -> tuple[Batch, list[dict[str, float]], dict[str, float]]:
    """Balance, calibrate and update; return the batch, the results of each optimiser step, and further metrics."""
    old, seen = recompute(trainer, samples, prompts) if recipe.recomputes else (None, {})
    batch = build_batch(samples, recipe.algorithm, seed_of(recipe.seed, step), old)
    batches = minibatches(batch, prompts, recipe.train.minibatches)
    updates = updater.update(step, batches)
    return batch, updates, seen | {"skipped_updates": float(len(batches) - len(updates))}


def share_right(outcomes: Sequence[Outcome], settings: Algorithm) -> float | None:
    """Return the share of the student's responses that are right, which scores a checkpoint; None if unknown."""
    known = [outcome.value >= settings.outcome_threshold for outcome in outcomes if outcome.known]
    return fmean(known) if known and settings.objective.samples_rollouts else None


def check_absent(samples: Sequence[Sample], limit: float, step: int) -> None:
    """Go on without the responses that could not be scored, unless they are too many.

    Raises:
        ServerError: they are too many; the message names the causes, with one detail of each.
    """
    absent = [s.score for s in samples if isinstance(s.score, Absent)]
    if len(absent) > limit * len(samples):
        causes = Counter((a.teacher, a.cause) for a in absent)
        details = {(a.teacher, a.cause): a.detail for a in absent}
        lines = "".join(
            f"\n  {n} x {cause} from {teacher}: {details[teacher, cause]}"
            for (teacher, cause), n in causes.most_common()
        )
        share = f"{len(absent)} of {len(samples)} responses have no score"
        raise ServerError(f"step {step}: {share}, more than train.max_absent = {limit} allows:{lines}")


def scoring(counts: Counter[str]) -> dict[str, float]:
    """Return the cost of a step's scores, as metrics: requests, failures by cause, hedged requests, reused scores."""
    always = {f"scoring/{name}": float(counts[name]) for name in ("requests", "reused", "hedged")}
    some = {name: n for name, n in sorted(counts.items()) if name.startswith("failed/") or name == "beyond_head"}
    return always | {f"scoring/{name}": float(n) for name, n in some.items()}
