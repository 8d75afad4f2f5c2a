"""The teachers of a run that goes on: those that it has learnt from, unless a change is on purpose."""

import dataclasses
import shutil
from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console

from mmopd.commands.job import Job
from mmopd.errors import CheckpointError, ConfigError
from mmopd.runtime.run_folder import RunFolder, step_of
from mmopd.settings_file import suggest
from mmopd.task.load import load_tasks
from mmopd.teacher import identity
from mmopd.teacher.identity import AS_REFERENCE, Change, Record, differences, identify
from mmopd.train.checkpoint_files import finished, problem, read_state, whole

OPTION = "--changed-teacher"


def check_teachers(job: Job, run: RunFolder, changed: Collection[str], console: Console) -> None:
    """Compare the teachers with those that the run has learnt from, and record them in the run folder.

    Nothing was learnt before the first checkpoint. What other teachers have answered is removed from the run.

    Args:
        changed: teachers that were changed on purpose.

    Raises:
        CheckpointError: another teacher was changed, or the record is damaged.
        ConfigError: there is no teacher with a name in `changed`.
        ServerError: a teacher that runs elsewhere does not answer.
    """
    fleets = {"": job.fleet} | ({AS_REFERENCE: job.references} if job.references else {})
    kinds = [pair for shards in job.sources.values() for pair in shards.kinds]
    now = identify(fleets, load_tasks(), kinds, job.elsewhere)
    latest = next(whole(run.checkpoints), None)
    step = 0 if latest is None else step_of(latest.name)
    for path in finished(run.checkpoints):
        if step_of(path.name) > step:
            _say(console, f"{path.name} is left out, and the run goes on from step {step}: {problem(path)}")
    before = _known(run, latest)
    _check_names(changed, {**now, **(before.teachers if before else {})})
    found = differences(before.teachers, now) if before else {}
    if latest is not None:
        _check_named(found, changed, run)
        if before is None:
            _say(console, f"this run has no record of its teachers before step {step}, so that they are not compared")
    for name in sorted(set(changed) - found.keys()):
        _say(console, f"{OPTION} {name}: nothing has changed")
    if found or before is None:
        shutil.rmtree(run.scores, ignore_errors=True)
        if not job.recipe.algorithm.objective.trains:
            shutil.rmtree(run.export, ignore_errors=True)  # it was merged from the teachers
    changes = [dataclasses.replace(one, step=min(one.step, step)) for one in (before.changed if before else ())]
    if latest is None:
        for name, what in found.items():
            _say(console, f"teacher {name} is another one than at the start; no step has used it: {'; '.join(what)}")
    else:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        for name, what in found.items():
            _say(console, f"teacher {name} is another one from step {step} on: {'; '.join(what)}")
            changes.append(Change(name, step, date, what, before.teachers.get(name) if before else None))
    identity.save(run.teachers, Record(now, tuple(changes)))


def _known(run: RunFolder, latest: Path | None) -> Record | None:
    """Return the record of the run folder, or else that of the newest checkpoint."""
    record = identity.load(run.teachers)
    if record is not None or latest is None:
        return record
    try:
        return msgspec.convert(read_state(latest)["teachers"], Record | None)
    except msgspec.ValidationError as error:
        raise CheckpointError(
            f"{latest}: its record of the teachers is damaged ({error}); remove {latest} to go on from the checkpoint "
            "before it"
        ) from None


def _check_names(changed: Collection[str], known: Collection[str]) -> None:
    for name in changed:
        if name not in known:
            raise ConfigError(f"{OPTION} {name}: the run has no such teacher{suggest(name, known)}")


def _check_named(found: dict[str, tuple[str, ...]], changed: Collection[str], run: RunFolder) -> None:
    if not (refused := {name: what for name, what in found.items() if name not in changed}):
        return
    said = "".join(f"\n  {name}: {'; '.join(what)}" for name, what in refused.items())
    options = " ".join(f"{OPTION} {name}" for name in found)
    raise CheckpointError(
        f"{run.root}: its teachers are not those that it has learnt from:{said}\nput them back, or go on with those of "
        f"now by `mmopd train --resume {run.root} {options}`"
    )


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
