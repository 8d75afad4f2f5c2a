"""Preflight of a fleet: examine all replicas of all teachers in parallel before a run relies on their scores.

A request may take half of the teacher's `timeout`, like an attempt in the run. Cost for each replica: one request for
each 1,000 ids of the vocabulary (152 for Qwen's), and about 80 short requests.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

from rich.console import Console

from mmopd.config import Fleet, Teacher
from mmopd.errors import ConfigError, ServerError
from mmopd.modality import Encoder
from mmopd.modality.encode import head_rows
from mmopd.preflight.check import Check, render
from mmopd.preflight.examination import Examination, Vocabulary
from mmopd.preflight.questions import BAD_ROW, Kind, Questions, questions
from mmopd.preflight.scores import apart, difference
from mmopd.records import Prompt, Response
from mmopd.rollout.student_client import PromptRefusedError, StudentClient
from mmopd.runtime.http import session
from mmopd.serving.endpoint import Endpoint
from mmopd.task.base import Task

RESPONSES = 2  # number of the student's responses to each shown prompt
RESPONSE_TOKENS = 64  # maximum length; enough to tell an image from a blank one
RESPONSE_SECONDS = 600.0  # time limit for all of them; an engine that takes longer hangs


async def preflight(
    fleet: Fleet,
    tasks: Mapping[str, Task],
    endpoints: Mapping[str, Sequence[Endpoint]],
    encoder: Encoder,
    kinds: Sequence[Kind],
    *,
    max_tokens: int,
    top_k: int = 0,
    responses: Mapping[str, Sequence[tuple[int, ...]]] | None = None,
    done: Callable[[Endpoint], None] = lambda endpoint: None,
) -> list[Check]:
    """Return the checks of each replica of each teacher, in the fleet's order.

    `Check.of` is the replica, or the teacher if the check concerns all its replicas.

    Args:
        fleet: teachers and routes.
        tasks: by name.
        endpoints: the replicas of each teacher, by its name in the fleet.
        encoder: the student's.
        kinds: the prompts of the run, from `questions.look`.
        max_tokens: maximum length of a response.
        top_k: number of ids whose log-probs the run needs at each position; 0 = only those of the response.
        responses: the student's responses by the key of their prompt; scored in addition to the answer key.
        done: called with each replica that has been examined.

    Raises:
        ConfigError: a teacher that a route leads to has no endpoint.
    """
    if missing := sorted({name for route in fleet.routes for name in route.teachers if not endpoints.get(name)}):
        raise ConfigError(
            f"teacher {missing[0]!r} has no endpoint; start its server before the run, or set its `endpoints` in the "
            "fleet"
        )
    vocabulary = Vocabulary(encoder)
    # Each request has its own connection: uvicorn closes one after an error without notice, and nothing is retried
    # here.
    async with session(force_close=True) as http:
        groups: dict[str, list[Examination]] = {}
        asked_of: dict[str, Questions] = {}
        for name, teacher in fleet.teachers.items():
            asked = asked_of[name] = questions(name, fleet, tasks, encoder, kinds, responses=responses or {})
            groups[name] = [
                Examination(
                    endpoint,
                    asked,
                    http,
                    vocabulary,
                    timeout=teacher.timeout / 2,
                    key=teacher.api_key_env or "",
                    max_tokens=max_tokens,
                    top_k=top_k,
                )
                for endpoint in endpoints.get(name, ())
            ]
        await asyncio.gather(*(one.prove(done) for group in groups.values() for one in group))
        for one in (one for group in groups.values() for one in group):
            await one.prove_adapter()
    checks: list[Check] = []
    for name, group in groups.items():
        checks += showable(name, asked_of[name])
        checks += heights(name, fleet.teachers[name], encoder)
        for one in group:
            checks += one.checks
        checks += agreement(name, group)
    return checks


def showable(teacher: str, asked: Questions) -> list[Check]:
    """Check that every sampled prompt can be shown in the teacher's view; return no check if all can."""
    if not asked.unusable:
        return []
    first = next(iter(asked.unusable.values()))
    found = f"{_count(len(asked.unusable), 'prompt')} cannot be shown through its view: {first}"
    return [
        Check(
            "view",
            "warn" if asked.longest else "fail",
            found,
            "correct the view or the row; without it a response has no score",
            teacher,
        )
    ]


def heights(name: str, teacher: Teacher, encoder: Encoder) -> list[Check]:
    """Return the heights of the output heads of teacher and student if they are known and differ."""
    rows = head_rows(teacher.model) if teacher.model is not None else None
    if rows is None or rows == encoder.head:
        return []
    found = f"{rows:,} rows, and {encoder.head:,} of the student; likeliest ids beyond the student's count as the rest"
    return [Check("head", "ok", found, "", name, {"teacher": rows, "student": encoder.head})]


def agreement(teacher: str, group: Sequence[Examination]) -> list[Check]:
    """Compare the scores of the replicas whose scores repeat; return no check if fewer than two do."""
    worst = (0.0, 0.0)
    pair = ""
    tolerance = 0.0
    for a, b in combinations([one for one in group if one.scores], 2):
        both = a.scores.keys() & b.scores.keys()
        found = apart({i: a.scores[i] for i in both}, {i: b.scores[i] for i in both})
        if not pair or found > worst:
            worst = found
            pair = f"{a.endpoint.name} and {b.endpoint.name}"
            tolerance = a.tolerance
    if not pair:
        return []
    numbers = {"mean": worst[0], "largest": worst[1], "tolerance": tolerance}
    what = difference(*worst)
    if worst[0] > tolerance:
        way_out = "serve the same weights with the same dtype and settings on each replica"
        return [Check("same on replicas", "fail", f"{pair}: {what}, {tolerance:g} allowed", way_out, teacher, numbers)]
    return [Check("same on replicas", "ok", what, "", teacher, numbers)]


async def answers(
    student: Endpoint, encoder: Encoder, kinds: Sequence[Kind], *, max_tokens: int
) -> dict[str, list[tuple[int, ...]]]:
    """Sample some responses of the student to each prompt that the preflight shows; return them by the prompt's key.

    A prompt that cannot be encoded, or that the engine refuses, has none: the run replaces and counts it.

    Raises:
        EngineError: the engine is gone, refuses every prompt, or gives an unusable answer.
    """
    prompts = [prompt for kind in kinds for prompt in kind.shown]
    refused: list[PromptRefusedError] = []

    async def some(engine: StudentClient, prompt: Prompt) -> list[Response]:
        try:
            encoded = encoder.encode(prompt)
            return await engine.sample(encoded, RESPONSES, 0, max_tokens=min(max_tokens, RESPONSE_TOKENS))
        except PromptRefusedError as error:
            refused.append(error)
        except BAD_ROW:
            pass  # `showable` says which
        return []

    async with StudentClient(student, encoder, timeout=RESPONSE_SECONDS) as engine:
        sampled = await asyncio.gather(*(some(engine, prompt) for prompt in prompts))
    if refused and not any(sampled):
        raise refused[0]
    return {prompt.key: [response.tokens for response in some] for prompt, some in zip(prompts, sampled, strict=True)}


def summary(checks: Sequence[Check], endpoints: Mapping[str, Sequence[Endpoint]]) -> str:
    """Return one line: number of teachers and replicas, and the number of checks by state."""
    states = [check.state for check in checks]
    parts = [
        f"{states.count('ok')} checks passed",
        *(f"{n} {word}" for word, n in (("failed", states.count("fail")), ("to look at", states.count("warn"))) if n),
    ]
    replicas = sum(map(len, endpoints.values()))
    return f"{_count(len(endpoints), 'teacher')}, {_count(replicas, 'replica')}: {', '.join(parts)}"


def save(checks: Sequence[Check], path: Path) -> None:
    """Write all checks as JSON."""
    path.write_text(json.dumps([asdict(check) for check in checks], indent=1), encoding="utf-8")


def show(checks: Sequence[Check], console: Console) -> None:
    """Print all checks as a table."""
    render(checks, console, title="Preflight of the teachers")


def insist(checks: Sequence[Check], console: Console) -> None:
    """Raise if a check failed; print the table of all checks if any is not ok.

    Raises:
        ServerError: a check failed; the message has each failure with its way out.
    """
    if any(check.state != "ok" for check in checks):
        show(checks, console)
    if failed := [f"- {c.of}, {c.name}: {c.found}\n  → {c.way_out}" for c in checks if c.state == "fail"]:
        raise ServerError("the teachers' scores cannot be trusted yet:\n" + "\n".join(failed))


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"
