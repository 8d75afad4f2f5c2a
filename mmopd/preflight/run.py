"""Proof before training: every replica of every teacher is examined, side by side, before a run believes its scores.

A request may take half of the teacher's `timeout`, as an attempt may in the run. Cost, of a replica: a request for each
1,000 ids of the vocabulary (152 for Qwen's), and about 80 short ones.
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

import aiohttp
from rich.console import Console

from mmopd.config import Fleet
from mmopd.errors import ConfigError, ServerError
from mmopd.modality import Encoder
from mmopd.preflight.check import Check, render
from mmopd.preflight.examination import Examination, Vocabulary
from mmopd.preflight.questions import Kind, Questions, questions
from mmopd.preflight.scores import apart, difference
from mmopd.records import Prompt, Response
from mmopd.rollout.student_client import StudentClient
from mmopd.serving.endpoint import Endpoint
from mmopd.task.base import Task

RESPONSES = 2  # of the student, to each prompt that is shown
RESPONSE_TOKENS = 64  # of them, at most: enough to tell an image from a blank
RESPONSE_SECONDS = 600.0  # for all of them: an engine that is so late hangs


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
    """What is found of each replica of each teacher, in the fleet's order; `of` is the replica, or the teacher for all
    of them.

    Args:
        endpoints: the replicas of each teacher, by its name in the fleet.
        encoder: the student's.
        kinds: the prompts of the run, from `probes.look`.
        max_tokens: of a response, at most.
        top_k: log-probs of so many ids that the run needs at each position; 0 = of the response's own alone.
        responses: by the key of a prompt, what the student answers; scored besides the answer key.
        done: told each replica that has been looked at.

    Raises:
        UserError: a teacher that a route leads to has no endpoint.
    """
    if missing := sorted({name for route in fleet.routes for name in route.teachers if not endpoints.get(name)}):
        raise ConfigError(
            f"teacher {missing[0]!r} has no endpoint; it must be served before the run, or name its `endpoints`"
        )
    vocabulary = Vocabulary(encoder)
    # A connection for each request: uvicorn ends one after an error without saying so, and nothing here is tried again.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as http:
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
    checks: list[Check] = []
    for name, group in groups.items():
        checks += showable(name, asked_of[name])
        for one in group:
            checks += one.checks
        checks += agreement(name, group)
    return checks


def showable(teacher: str, asked: Questions) -> list[Check]:
    """Every prompt that was tried can be put as the teacher is to be shown it; nothing where all can."""
    if not asked.unusable:
        return []
    first = next(iter(asked.unusable.values()))
    found = f"{_count(len(asked.unusable), 'prompt')} cannot be shown as its view says: {first}"
    return [
        Check(
            "view",
            "warn" if asked.longest else "fail",
            found,
            "correct the view or the row; without it a response has no score",
            teacher,
        )
    ]


def agreement(teacher: str, group: Sequence[Examination]) -> list[Check]:
    """The same scores on each replica, of those whose scores repeat; nothing where there is none to compare with."""
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
    """Some responses of the student to each prompt that the preflight shows, by the prompt's key.

    Raises:
        EngineError: the engine is gone, refuses, or answers with something else.
    """
    prompts = [prompt for kind in kinds for prompt in kind.shown]

    async def some(engine: StudentClient, prompt: Prompt) -> list[Response]:
        return await engine.sample(encoder.encode(prompt), RESPONSES, 0, max_tokens=min(max_tokens, RESPONSE_TOKENS))

    async with StudentClient(student, encoder, timeout=RESPONSE_SECONDS) as engine:
        sampled = await asyncio.gather(*(some(engine, prompt) for prompt in prompts))
    return {prompt.key: [response.tokens for response in some] for prompt, some in zip(prompts, sampled, strict=True)}


def summary(checks: Sequence[Check], endpoints: Mapping[str, Sequence[Endpoint]]) -> str:
    """One line: who was looked at, and how it went."""
    states = [check.state for check in checks]
    parts = [
        f"{states.count('ok')} checks passed",
        *(f"{n} {word}" for word, n in (("failed", states.count("fail")), ("to look at", states.count("warn"))) if n),
    ]
    replicas = sum(map(len, endpoints.values()))
    return f"{_count(len(endpoints), 'teacher')}, {_count(replicas, 'replica')}: {', '.join(parts)}"


def save(checks: Sequence[Check], path: Path) -> None:
    """All that was found, as JSON."""
    path.write_text(json.dumps([asdict(check) for check in checks], indent=1))


def show(checks: Sequence[Check], console: Console) -> None:
    """Print what was found as a table."""
    render(checks, console, title="What the teachers show")


def insist(checks: Sequence[Check], console: Console) -> None:
    """Nothing failed; what is not as it should be is printed, in the table of all.

    Raises:
        UserError: something failed; each failure with its way out.
    """
    if any(check.state != "ok" for check in checks):
        show(checks, console)
    if failed := [f"- {c.of}, {c.name}: {c.found}\n  → {c.way_out}" for c in checks if c.state == "fail"]:
        raise ServerError("the teachers' scores cannot be trusted yet:\n" + "\n".join(failed))


def _count(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"
