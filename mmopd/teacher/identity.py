"""What a run knows of its teachers, so that a resume notices another one under the same name.

`RUN/teachers.json` is a `Record`; each checkpoint has a copy in its state.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import msgspec

from mmopd.config import Fleet, Teacher
from mmopd.errors import CheckpointError
from mmopd.prompts.tokens import hash_processor
from mmopd.runtime.fingerprint import Fingerprint, sample_weights
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.lora import read_adapter
from mmopd.task.base import Task
from mmopd.teacher.fleet import running_elsewhere
from mmopd.teacher.router import find_teachers

AS_REFERENCE = " as reference"  # ends the name of prompts for which a teacher is the reference of another one


@dataclass(frozen=True, slots=True)
class Identity:
    """A teacher of a run."""

    model: str  # its folder, or the URLs of servers elsewhere; a teacher may move, so that this is not compared
    fingerprint: Fingerprint
    views: Mapping[str, Mapping[str, Any]]  # prompts, as "task/modality" -> its view of them, without defaults

    @property
    def key(self) -> list[str]:
        """A key for answers that other runs reuse; servers of an unknown model are told apart by their URLs."""
        found = self.fingerprint
        return [found.weights, found.adapter, found.tokenizer] if found.hashed else [found.weights, self.model]


@dataclass(frozen=True, slots=True)
class Change:
    """A teacher that was changed on purpose."""

    teacher: str
    step: int  # steps that were made before
    date: str
    what: tuple[str, ...]  # parts that differ
    before: Identity | None  # None: it was no teacher of the run


@dataclass(frozen=True, slots=True)
class Record:
    """The teachers of a run by name, and how they have changed."""

    teachers: Mapping[str, Identity]
    changed: tuple[Change, ...] = ()


def identify(
    fleets: Mapping[str, Fleet],
    tasks: Mapping[str, Task],
    kinds: Iterable[tuple[str, str]],
    elsewhere: Sequence[Endpoint],
) -> dict[str, Identity]:
    """Return the teachers by name, from their files or servers.

    Args:
        fleets: what follows the names of prompts (`AS_REFERENCE`, or nothing) -> the teachers and their routes.
        tasks: by name.
        kinds: (task, modality) of the prompts of the run.
        elsewhere: endpoints of teachers that `from_files` found.

    Raises:
        CheckpointError: an adapter or a file of weights cannot be read.
        ConfigError: an API key is not set.
        ServerError: a server elsewhere does not answer.
    """
    views: dict[str, dict[str, Mapping[str, Any]]] = {}
    for suffix, fleet in fleets.items():
        for task, modality in sorted(set(kinds)) if fleet.routes else ():
            for one in find_teachers(fleet, tasks, task, modality):
                shown = one.view.model_dump(mode="json", exclude_defaults=True)
                views.setdefault(one.name, {})[f"{task}/{modality}{suffix}"] = shown
    found = {}
    for name, teacher in {name: one for fleet in fleets.values() for name, one in fleet.teachers.items()}.items():
        there = [one for one in elsewhere if one.teacher == name]
        if not there and teacher.model is None:
            there = [
                running_elsewhere(f"{name}.{i}", url, teacher.api_key_env, teacher.proxy)
                for i, url in enumerate(teacher.endpoints)
            ]
        model = " ".join(sorted(one.url for one in there)) if there else str(teacher.model)
        fingerprint = _of_all(there) if there else fingerprint_of(teacher)
        found[name] = Identity(model, fingerprint, views.get(name, {}))
    return found


def fingerprint_of(teacher: Teacher) -> Fingerprint:
    """Return the fingerprint of a teacher that has a `model` on this machine.

    Raises:
        CheckpointError: its adapter or a file of weights cannot be read.
    """
    assert teacher.model is not None
    adapter = sample_weights(read_adapter(teacher.adapter).path) if teacher.adapter else ""
    return Fingerprint(sample_weights(teacher.model), adapter, hash_processor(teacher.model))


def differences(before: Mapping[str, Identity], now: Mapping[str, Identity]) -> dict[str, tuple[str, ...]]:
    """Return what differs of each teacher that is not the same, in words.

    A teacher that came or went differs if it scores, or scored, prompts that the run had before and still has. Prompts
    that came or went with a source, and their teachers, are no difference.
    """
    kept = _prompts(before) & _prompts(now)
    found: dict[str, tuple[str, ...]] = {}
    for name in {**before, **now}:
        was, new = before.get(name), now.get(name)
        what = []
        if was and new:
            hashed = was.fingerprint.hashed and new.fingerprint.hashed
            for part in fields(Fingerprint) if hashed else fields(Fingerprint)[:1]:
                a, b = getattr(was.fingerprint, part.name), getattr(new.fingerprint, part.name)
                if a != b:
                    what.append(f"{part.name} ({a or 'none'} before, {b or 'none'} now)")
        for prompts in sorted(kept):
            a, b = (one.views.get(prompts) if one else None for one in (was, new))
            if a is None and b is not None:
                what.append(f"it did not score {prompts} before")
            elif a is not None and b is None:
                what.append(f"it no longer scores {prompts}")
            elif a != b:
                what.append(f"its view of {prompts}")
        if what:
            found[name] = tuple(what)
    return found


def load(path: Path) -> Record | None:
    """Return the record in a file; None if the file is not there.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"{path}: damaged ({error}); delete it to compare the teachers with those of the newest checkpoint"
        ) from None


def known(path: Path) -> Mapping[str, Identity]:
    """Return the teachers of a run by name, from the file that its launcher wrote.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    record = load(path)
    if record is None:
        raise CheckpointError(f"{path}: missing; `mmopd train` writes it before it starts the servers")
    return record.teachers


def save(path: Path, record: Record) -> None:
    """Write a record in place of an earlier one."""
    part = path.with_suffix(".partial")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
    part.replace(path)


def _of_all(replicas: Sequence[Endpoint]) -> Fingerprint:
    """Return the fingerprint of a teacher with these replicas; the preflight says whether they agree."""
    parts = ({getattr(one.fingerprint, part.name) for one in replicas} for part in fields(Fingerprint))
    return Fingerprint(*(" and ".join(sorted(part)) for part in parts))


def _prompts(teachers: Mapping[str, Identity]) -> set[str]:
    return {prompts for one in teachers.values() for prompts in one.views}
