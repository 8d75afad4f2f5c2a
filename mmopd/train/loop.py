"""The training loop. A step: draw, roll out, balance and calibrate, update, sync, probe, record, checkpoint.

Every rank runs it. Prompts, balance and packing are computed alike on all ranks from the same numbers; a rank rolls out
its own groups and decodes its own images, and rank 0 alone sends weights and writes metrics.
"""

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from mmopd import catalog
from mmopd.card import model_card
from mmopd.config import Recipe
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.prompts import difficulty
from mmopd.prompts.plan import Plan, Rows
from mmopd.prompts.schedule import Schedule
from mmopd.prompts.shards import Shards, open_mixture
from mmopd.prompts.tokens import hash_processor
from mmopd.records import Absent, Sample
from mmopd.rollout.collect import seed_of
from mmopd.rollout.sync import FileSync
from mmopd.run import RunFolder
from mmopd.train.batch import build_batch, minibatches
from mmopd.train.checkpoint import Checkpoints, load
from mmopd.train.distributed import Ranks
from mmopd.train.engine import Trainer
from mmopd.train.export import export
from mmopd.train.guard import Guard
from mmopd.train.probe import probe, probe_items
from mmopd.train.record import Recorder
from mmopd.train.rollouts import Rollouts
from mmopd.train.watchdog import Watchdog


async def train(
    run: RunFolder, recipe: Recipe, ranks: Ranks, *, changed: Collection[str], stop: threading.Event, watchdog: Watchdog
) -> None:
    """Train from the last checkpoint of the run, or from the start, to the end; then export.

    Args:
        changed: sources that were added to the mixture or removed from it on purpose, since the checkpoint.
        stop: once it is set on a rank, all end behind the step that they are in, with a checkpoint and without an export.
        watchdog: is told of all progress.

    Raises:
        UserError: too many responses lack a score, too many updates were skipped, or the run cannot be continued with this data.
        RuntimeError: engine and trainer disagree after a weight sync.
    """
    encoder, tasks = Encoder(recipe.student.model), catalog.load_tasks()
    mixture = catalog.load_mixture(recipe.mixture)
    sources = open_mixture(mixture, tasks, Path.cwd(), hash_processor(recipe.student.model))
    schedule = Schedule(mixture)
    plan = make_plan(recipe, sources, schedule, run)
    trainer = Trainer(recipe.student.model, encoder, recipe.train, recipe.algorithm, ranks)
    trainer.student.register_forward_pre_hook(lambda *_: watchdog.beat())
    checkpoints = Checkpoints(run.checkpoints, recipe.train.keep_checkpoints)
    guard = Guard(run, trainer)
    done = restore(checkpoints, trainer, plan, schedule, guard=guard, changed=changed)
    probes = probe_items(list(sources.values()), encoder)
    writes = ranks.rank == 0
    link = FileSync(run.read_endpoints()[0]) if writes else None
    recorder = Recorder(run, recipe, encoder, done) if writes else None
    async with Rollouts(run, recipe, sources, encoder, ranks) as rollouts:
        with link or nullcontext(), recorder or nullcontext(), watchdog:
            watchdog.beat_with(asyncio.get_running_loop())
            publish(trainer, link, f"step-{done}", everything=True)
            await probe(trainer, rollouts.engine, probes, recipe.train.probe_tolerance)
            clock = Clock(watchdog)
            for step in range(done, recipe.train.steps):
                watchdog.beat(f"step {step}")
                plan.reweight(schedule.weights(step))
                prompts = plan.read(recipe.rollout.prompts, lambda name, row: encoder.encode(sources[name][row]))
                with clock("rollout"):
                    samples, counts = await rollouts.step(step, prompts)
                    schedule.observe((prompts[s.group].prompt.key.rpartition("/")[0], s.outcome.value) for s in samples)
                check_same_prompts(plan, ranks)
                check_absent(samples, recipe.train.max_absent, step)
                with clock("update"):
                    batch = build_batch(samples, recipe.algorithm, seed_of(recipe.seed, step))
                    batches = minibatches(batch, prompts, recipe.train.minibatches)
                    updates = guard.update(step, batches)
                with clock("sync"):
                    publish(trainer, link, f"step-{step + 1}")
                    gap = await probe(trainer, rollouts.engine, probes, recipe.train.probe_tolerance)
                if recorder is not None:
                    more = clock.metrics() | {"probe": gap, "skipped_updates": float(len(batches) - len(updates))}
                    more |= scoring(counts) | progress(plan)
                    recorder.step(step, prompts, samples, batch, updates=updates, more=more)
                clock = Clock(watchdog)  # a checkpoint counts in the step behind it: its own is on disk before it
                last, stopping = step + 1 == recipe.train.steps, any(ranks.all_max([stop.is_set()]))
                if (step + 1) % recipe.train.checkpoint_every == 0 or last or stopping:
                    with clock("checkpoint"):
                        state = {"step": step + 1, "plan": plan.state(), "schedule": schedule.state(), "skipped": guard.state()}
                        checkpoints.save(trainer, step + 1, state)
                        rollouts.kept.clear()
                if stopping and not last:
                    return
            export(trainer, run.export, model_card(run, recipe))


def make_plan(recipe: Recipe, sources: Mapping[str, Shards], schedule: Schedule, run: RunFolder) -> Plan:
    """The mixture by weight, and inside a source by difficulty where the recipe says so."""
    measured = difficulty.load(run.difficulty / difficulty.FILE) if recipe.algorithm.difficulty else {}
    rows = {name: Rows(len(shards), shards.fingerprint, measured[name].weights if measured else None) for name, shards in sources.items()}
    return Plan(rows, schedule.weights(0), recipe.seed)


def restore(checkpoints: Checkpoints, trainer: Trainer, plan: Plan, schedule: Schedule, *, guard: Guard, changed: Collection[str]) -> int:
    """Steps done: those of the newest whole checkpoint, whose state trainer, plan, schedule and guard take; 0 without one."""
    latest = checkpoints.latest()
    if latest is None:
        return 0
    state = load(trainer, latest)
    plan.restore(state["plan"], change=changed)
    schedule.restore(state["schedule"])
    guard.restore(state["skipped"])
    return int(state["step"])


def publish(trainer: Trainer, link: FileSync | None, version: str, *, everything: bool = False) -> None:
    """Give the engine the weights that updates change, or, the first time, everything. All ranks gather; the one with a link sends."""
    partial = trainer.keeps_some and not everything
    weights = trainer.named_weights(trained=partial)
    if link is not None:
        link.send(weights, version, partial=partial)
    else:
        for _ in weights:
            pass


def check_same_prompts(plan: Plan, ranks: Ranks) -> None:
    """All ranks have drawn the same rows.

    Raises:
        UserError: a row could be read on one rank and not on another.
    """
    if len(set(ranks.gather_objects(sum(plan.replaced.values())))) > 1:
        raise UserError("a row could be read on one rank and not on another: all ranks must see the same shards, whole")


def check_absent(samples: Sequence[Sample], limit: float, step: int) -> None:
    """Go on without the responses that could not be scored, unless they are too many.

    Raises:
        UserError: names the causes, with one detail of each.
    """
    absent = [s.score for s in samples if isinstance(s.score, Absent)]
    if len(absent) > limit * len(samples):
        causes = Counter((a.teacher, a.cause) for a in absent)
        details = {(a.teacher, a.cause): a.detail for a in absent}
        lines = "".join(f"\n  {n} x {cause} from {teacher}: {details[teacher, cause]}" for (teacher, cause), n in causes.most_common())
        share = f"{len(absent)} of {len(samples)} responses have no score"
        raise UserError(f"step {step}: {share}, more than train.max_absent = {limit} allows:{lines}")


def scoring(counts: Counter[str]) -> dict[str, float]:
    """What the scores of a step cost, as metrics: requests, those that failed by cause, those that were hedged or not needed."""
    always = {f"scoring/{name}": float(counts[name]) for name in ("requests", "reused", "hedged")}
    return always | {f"scoring/{name}": float(n) for name, n in sorted(counts.items()) if name.startswith("failed/")}


def progress(plan: Plan) -> dict[str, float]:
    """How often each source has been gone through, and how many of its rows could not be used, as metrics."""
    bad = Counter[str]()
    for (name, _), rows in plan.replaced.items():
        bad[name] += rows
    return {f"epoch/{name}": times for name, times in plan.epochs().items()} | {f"replaced/{name}": float(n) for name, n in bad.items()}


class Clock:
    """Seconds of each part of a step."""

    def __init__(self, watchdog: Watchdog) -> None:
        self.seconds: dict[str, float] = {}
        self._watchdog = watchdog
        self._begin = time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Time one part."""
        self._watchdog.beat(f"{self._watchdog.where.partition(',')[0]}, {part}")
        begin = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - begin

    def metrics(self) -> dict[str, float]:
        """The parts, and the whole since the step began."""
        return {"seconds": time.perf_counter() - self._begin} | {f"seconds/{part}": s for part, s in self.seconds.items()}
