"""Collect the teachers' own answers (for SFT): each prompt goes to its routed teachers, and right answers are kept.

This runs once, before training, into a file next to the shards that names what it was made from; every seed and mixture
shares it. Token ids are kept, not text, with the teacher's own log-probs.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path
from random import Random
from typing import Any

from mmopd.algorithm.base import Objective
from mmopd.algorithm.settings import Algorithm
from mmopd.config import Fleet, Rollout, Student
from mmopd.errors import ConfigError, DataError
from mmopd.modality import Encoder
from mmopd.passes.each_row import each_row
from mmopd.prompts.ledger import Ledger, Origin, ledger_file
from mmopd.prompts.shards import Shards
from mmopd.records import Encoded, Outcome, Response, Sample, Score
from mmopd.rollout.collect import seed_of
from mmopd.rollout.student_client import StudentClient
from mmopd.runtime.progress import Stage
from mmopd.serving.endpoint import Endpoint
from mmopd.task.load import load_tasks
from mmopd.task.verifier_pool import VerifierPool
from mmopd.teacher.identity import Identity
from mmopd.teacher.router import find_teachers
from mmopd.teacher.view import encode_view


class Answers(Ledger):
    """The right answers to each row, each as [teacher, weight, ids, log-probs]."""

    what = "the teachers' answers"


def attempts_of(objective: Objective) -> int:
    """Return how many answers teachers give to each prompt.

    Raises:
        ConfigError: the objective uses no teacher answers.
    """
    if not objective.teacher_answers():
        raise ConfigError(
            f"algorithm.objective: `{objective.kind}` does not learn from the teachers' own answers; `sft` does"
        )
    return objective.teacher_answers()


def find_answers(
    sources: Mapping[str, Shards],
    *,
    fleet: Fleet,
    rollout: Rollout,
    algorithm: Algorithm,
    identities: Mapping[str, Identity],
) -> dict[str, tuple[Path, Origin]]:
    """Return where the answers to each source are kept, and what they are made from.

    Args:
        identities: of the teachers, by name; another teacher has other answers.

    Raises:
        ConfigError: a prompt has no teacher.
    """
    tasks = load_tasks()
    found: dict[str, tuple[Path, Origin]] = {}
    sampling = {"attempts": attempts_of(algorithm.objective)} | rollout.model_dump(
        include={"temperature", "top_p", "top_k", "max_tokens"}
    )
    for name, shards in sources.items():
        routed = {
            f"{task}/{modality}": find_teachers(fleet, tasks, task, modality) for task, modality in sorted(shards.kinds)
        }
        asked = {
            kind: [[one.name, *identities[one.name].key, one.share, one.weight, one.view.model_dump()] for one in some]
            for kind, some in routed.items()
        }
        made_from = {
            "data": shards.fingerprint,
            "teachers": asked,
            "sampling": sampling,
            "threshold": algorithm.outcome_threshold,
        }
        found[name] = ledger_file(shards, "answers", made_from), made_from
    return found


def run_answers(
    sources: Mapping[str, Shards],
    teachers: Mapping[str, Sequence[Endpoint]],
    stage: Stage,
    *,
    student: Student,
    fleet: Fleet,
    rollout: Rollout,
    algorithm: Algorithm,
    timeout: float,
    identities: Mapping[str, Identity],
) -> None:
    """Let the teachers answer all prompts that have no answers yet.

    Args:
        teachers: the replicas of each teacher.
        timeout: seconds for an answer of a teacher.
        identities: of the teachers, by name.

    Raises:
        EngineError: a teacher does not answer; finished answers are kept.
        DataError: a file cannot be used, or no answer to a source is right.
    """
    with ExitStack() as stack:
        files = find_answers(sources, fleet=fleet, rollout=rollout, algorithm=algorithm, identities=identities)
        answers = {name: stack.enter_context(Answers(*where)) for name, where in files.items()}
        total = sum(map(len, sources.values()))
        done = sum(map(len, answers.values()))
        stage.total(total, done=done)
        foreign = 0
        if done < total:
            foreign = asyncio.run(
                _ask(
                    sources,
                    answers,
                    teachers,
                    stage,
                    student=student,
                    fleet=fleet,
                    rollout=rollout,
                    algorithm=algorithm,
                    timeout=timeout,
                )
            )
        right = {name: sum(len(one[row]) for row in range(len(sources[name]))) for name, one in answers.items()}
        if none := [name for name, n in right.items() if not n]:
            raise DataError(
                f"source {none[0]}: no answer of its teachers is right, so there is nothing to learn from; check its "
                "verifier"
            )
        empty = sum(not one[row] for name, one in answers.items() for row in range(len(sources[name])))
    asked = total * attempts_of(algorithm.objective)
    stage.outcome = f"{sum(right.values()):,} right answers of {asked:,}, {empty:,} prompts without one"
    if foreign:
        stage.outcome += f"; {foreign:,} right answers left out: they have tokens that the student lacks"


async def _ask(
    sources: Mapping[str, Shards],
    answers: Mapping[str, Answers],
    teachers: Mapping[str, Sequence[Endpoint]],
    stage: Stage,
    *,
    student: Student,
    fleet: Fleet,
    rollout: Rollout,
    algorithm: Algorithm,
    timeout: float,
) -> int:
    """Return the number of right answers that are left out, since they have tokens that the student lacks."""
    foreign = 0
    encoder = Encoder(student.model)
    ours = frozenset(encoder.tokenizer.get_vocab().values())  # a teacher may have more tokens
    n = attempts_of(algorithm.objective)
    tasks = load_tasks()
    async with AsyncExitStack() as stack:
        engines = {
            name: [await stack.enter_async_context(StudentClient(one, encoder, timeout=timeout)) for one in replicas]
            for name, replicas in teachers.items()
        }
        verifiers = stack.enter_context(VerifierPool())

        async def right_of(encoded: Encoded) -> list[Any]:
            nonlocal foreign
            prompt = encoded.prompt
            draw = Random(seed_of("answers", encoded.prompt.key))
            routed = find_teachers(fleet, tasks, prompt.task, prompt.modality)
            kept: list[Any] = []
            # Several teachers share the attempts in proportion to their shares of the target.
            for i, times in Counter(
                draw.choices(range(len(routed)), [teacher.share for teacher in routed], k=n)
            ).items():
                teacher = routed[i]
                shown = await asyncio.to_thread(encode_view, encoder, encoded, teacher.view)
                responses = await draw.choice(engines[teacher.name]).sample(
                    shown,
                    times,
                    seed_of("answers", prompt.key, teacher.name),
                    max_tokens=rollout.max_tokens,
                    temperature=rollout.temperature,
                    top_p=rollout.top_p,
                    top_k=rollout.top_k,
                )
                outcomes = await asyncio.gather(
                    *(verifiers.verify(prompt.task, r.text, prompt.answer) for r in responses)
                )
                right = [
                    response
                    for response, outcome in zip(responses, outcomes, strict=True)
                    if outcome.known and outcome.value >= algorithm.outcome_threshold
                ]
                usable = [response for response in right if ours.issuperset(response.tokens)]
                foreign += len(right) - len(usable)
                kept += [[teacher.name, teacher.weight, r.tokens, [round(x, 6) for x in r.logprobs]] for r in usable]
            return kept

        await each_row(sources, answers, encoder, right_of, (), at_once=rollout.concurrency, stage=stage)
    return foreign


class Library:
    """Serves the answers as samples of a step.

    Raises:
        ConfigError: a prompt has no teacher.
        DataError: an answer file is missing or cannot be used.
    """

    def __init__(
        self,
        sources: Mapping[str, Shards],
        encoder: Encoder,
        *,
        fleet: Fleet,
        rollout: Rollout,
        algorithm: Algorithm,
        identities: Mapping[str, Identity],
        seed: int,
    ) -> None:
        self._sources = sources
        self._encoder = encoder
        self._group = rollout.group
        self._seed = seed
        files = find_answers(sources, fleet=fleet, rollout=rollout, algorithm=algorithm, identities=identities)
        self._answers = {name: Answers.read(*where) for name, where in files.items()}

    def samples(self, number: int, encoded: Encoded, step: int) -> list[Sample]:
        """Return up to G right answers to a prompt, drawn without replacement; empty if its teachers had none."""
        key = encoded.prompt.key
        source = key.rpartition("/")[0]
        found = self._answers[source][self._sources[source].row_of(key)]
        draw = Random(seed_of(self._seed, step, key))
        return [
            Sample(
                number,
                Response(
                    tuple(tokens),
                    tuple(logprobs),
                    self._encoder.decode(tuple(tokens)),
                    "stop",
                    ((teacher, len(tokens)),),
                ),
                Outcome(1.0),
                score,
            )
            for teacher, weight, tokens, logprobs in draw.sample(found, min(self._group, len(found)))
            for score in [Score(teacher, tuple(logprobs), weight)]
        ]
