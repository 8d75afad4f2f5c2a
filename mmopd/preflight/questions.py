"""Questions of the preflight, each shown through the teacher's view.

They are the longest prompts of a mixture, prompts with images and other media in awkward sizes, and prompts with blank
or shuffled media.
"""

import heapq
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from mmopd.config import Fleet, Teacher, View
from mmopd.errors import ConfigError, DataError, UserError
from mmopd.modality import Encoder, Medium
from mmopd.modality.pixels import draw
from mmopd.modality.registry import MEDIA, check_items, shown_items
from mmopd.prompts.shards import Shards
from mmopd.records import Encoded, Prompt
from mmopd.task.base import Task
from mmopd.teacher.router import find_teachers
from mmopd.teacher.view import blinded, encode_view, sees_image

# Rows of a source, evenly spaced, that are read to find the longest, if the source's index has no token counts.
LOOKED_AT = 1000
LONGEST = 32  # largest rows of each (task, modality) that are encoded
SHOWN = 4  # prompts of each source that are scored with a response
CHARACTERS = 3  # approximate characters of a token; used only to rank prompts before they are encoded
# (Tolerance of log-probs that should be equal, as the mean over a response; least change of a log-prob by another
# image). PRECISE is for a server that computes in float32, COARSE for 16 bits or an unknown dtype.
PRECISE = (1e-4, 1e-2)
COARSE = (5e-2, 0.25)
BAD_ROW = (UserError, ValueError, OSError)  # a row that cannot be read or shown; OSError: pixels that do not decode


@dataclass(slots=True)
class Kind:
    """Prompts of one task and modality for the preflight."""

    task: str
    modality: str
    rows: int = 0  # rows examined, in shards or in their index
    unreadable: int = 0  # unreadable rows of its sources
    longest: list[Prompt] = field(default_factory=list)
    shown: list[Prompt] = field(default_factory=list)


def look(sources: Mapping[str, Sequence[Prompt]], encoder: Encoder) -> list[Kind]:
    """Return the kinds of prompts, each with its largest prompts, by the size of text and images, and some typical
    ones.

    A row that cannot be read is only counted; the training run decides what to do with it.

    Raises:
        DataError: no row of a source can be read; the message names the source.
    """
    kinds: dict[tuple[str, str], Kind] = {}
    for name, shards in sources.items():
        typical = set(range(0, len(shards), ceil(len(shards) / SHOWN)))
        counted = _counted(shards)
        largest = counted if counted else range(0, len(shards), ceil(len(shards) / LOOKED_AT))
        rows = sorted({*typical, *largest})
        unreadable = 0
        here: dict[tuple[str, str], list[tuple[int, int, Prompt]]] = {}  # the largest rows of this source so far
        for row in rows:
            try:
                prompt = shards[row]
                size = _size(prompt, encoder)
                key = (prompt.task, prompt.modality)
                show = row in typical or key not in kinds or not kinds[key].shown
                if show:
                    check_items(prompt)
            except BAD_ROW:
                unreadable += 1
                continue
            kind = kinds.setdefault(key, Kind(*key))
            heap = here.setdefault(key, [])
            kind.rows += 1
            if show:
                kind.shown.append(prompt)
            heapq.heappush(heap, (size, -row, prompt))
            if len(heap) > LONGEST:
                heapq.heappop(heap)
        if not here:
            raise DataError(
                f"sources.{name}: none of the {len(rows)} rows that were tried can be read; write the source again"
            )
        for key, heap in here.items():
            kinds[key].rows += len(shards) - len(rows) if counted else 0
            kinds[key].unreadable += unreadable
            kinds[key].longest += [prompt for _, _, prompt in sorted(heap, reverse=True)]
    return list(kinds.values())


def _counted(shards: Sequence[Prompt]) -> list[int]:
    """Return the longest rows by the token counts of the index, so that few shards are read.

    The list is empty if the index does not give the kinds of the rows too.
    """
    if not isinstance(shards, Shards) or shards.processor is None or len(shards.kinds) > 1:
        return []
    return heapq.nlargest(SHOWN, range(len(shards)), key=lambda row: shards.tokens(row) or 0)


def _size(prompt: Prompt, encoder: Encoder) -> int:
    text = (
        sum(len(str(message["content"])) for message in prompt.messages)
        + sum(map(len, prompt.extra.values()))
        + len(prompt.answer)
    )
    shown = [(encoder.reader(medium), files) for medium, files in shown_items(prompt)]
    return text // CHARACTERS + sum(reader.tokens(reader.grid(files)) for reader, files in shown)


@dataclass(frozen=True, slots=True)
class Question:
    """A response to score after a prompt, in the teacher's view."""

    encoded: Encoded
    tokens: tuple[int, ...]
    # The prompt with blank and with shuffled items, if items of media are shown.
    others: Mapping[str, Encoded] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Sized:
    """A prompt whose items of a medium have an awkward size."""

    name: str
    size: str  # width x height, pixels
    encoded: Encoded
    tokens: int  # number of visual tokens
    token: int  # id of a visual token
    medium: Medium


@dataclass(slots=True)
class Questions:
    """All questions for the replicas of one teacher."""

    plain: Question  # short, only text
    tolerance: float  # for log-probs that should be equal, mean over a response
    alive: float  # a log-prob must change by more than this with another image
    to_score: list[Question] = field(default_factory=list)
    sizes: list[Sized] = field(default_factory=list)
    spelled: list[Encoded] = field(default_factory=list)  # prompts whose texts and key spell control tokens
    longest: Encoded | None = None  # None if no prompt is routed to the teacher
    looked: str = ""  # number of prompts among which it is the longest, in words
    unusable: dict[str, str] = field(default_factory=dict)  # key of a prompt -> why it cannot be shown


def questions(
    name: str,
    fleet: Fleet,
    tasks: Mapping[str, Task],
    encoder: Encoder,
    kinds: Sequence[Kind],
    *,
    responses: Mapping[str, Sequence[tuple[int, ...]]],
) -> Questions:
    """Return the questions for teacher `name` about the prompts routed to it, or one plain question if there are none.

    Raises:
        ConfigError: a prompt has more items of a medium than the teacher's server accepts.
    """
    routed = [
        (kind, teacher.view)
        for kind in kinds
        for teacher in find_teachers(fleet, tasks, kind.task, kind.modality)
        if teacher.name == name
    ]
    _check_limits(name, fleet.teachers[name], routed)
    plain = encoder.encode(
        Prompt("preflight", "", "text", ({"role": "user", "content": "What is 12 + 30?"},), (), "42")
    )
    tolerance, alive = PRECISE if in_float32(fleet.teachers[name]) else COARSE
    asked = Questions(Question(plain, encoder.encode_answer("42")), tolerance, alive)
    asked.to_score.append(asked.plain)
    for view in _different(view for _, view in routed):
        through_it = [kind for kind, one in routed if one == view]
        _measure_media(asked, encoder, through_it, view)
        _spell(asked, encoder, through_it, view)
    _show(asked, encoder, routed, responses)
    _find_longest(asked, encoder, routed)
    return asked


def in_float32(teacher: Teacher) -> bool:
    """Return true if the teacher's scores are computed in float32; an unknown dtype counts as false."""
    if teacher.model is None or teacher.engine.dtype != "auto":
        return teacher.model is not None and teacher.engine.dtype == "float32"
    path = teacher.model / "config.json"  # may be missing on this machine
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return str(config.get("dtype") or config.get("torch_dtype")) == "float32"


def _check_limits(name: str, teacher: Teacher, routed: Sequence[tuple[Kind, View]]) -> None:
    prompts = [prompt for kind, view in routed if view.images != "drop" for prompt in kind.shown]
    for medium in MEDIA.values():
        if medium.limit is None or teacher.model is None:
            continue
        allowed = getattr(teacher.engine, medium.limit)
        needed = max((len(prompt.items(medium.name)) for prompt in prompts), default=0)
        if needed > allowed:
            raise ConfigError(
                f"teachers.{name}.engine.{medium.limit} is {allowed}, but prompts with {needed} are routed to the "
                f"teacher: set it to {needed}"
            )


def _show(
    asked: Questions,
    encoder: Encoder,
    routed: Sequence[tuple[Kind, View]],
    responses: Mapping[str, Sequence[tuple[int, ...]]],
) -> None:
    """Add `SHOWN` prompts with images to see, and as many without.

    The first prompt of every kind comes before the second of any.
    """
    left = {True: SHOWN, False: SHOWN}
    ranked = sorted(
        ((i, prompt, view) for kind, view in routed for i, prompt in enumerate(kind.shown)), key=lambda one: one[0]
    )
    for i, prompt, view in ranked:
        sees = sees_image(view) and prompt.is_visual
        if not left[sees]:
            continue
        try:
            shown = _through(encoder, prompt, view)
            if prompt.is_visual:
                encoder.pixel_values(encoder.encode(prompt))  # the trainer's grids are those that were counted
            others = {}
            if sees:
                others["blank"] = _through(encoder, prompt, blinded(view))
                others["shuffled"] = _through(encoder, _shuffled(prompt, i), view)
        except BAD_ROW as error:
            asked.unusable[prompt.key] = str(error)
            continue
        left[sees] -= 1
        answer = encoder.encode_answer(prompt.answer)
        asked.to_score += [
            Question(shown, tokens, others) for tokens in dict.fromkeys([*responses.get(prompt.key, ()), answer])
        ]


def _shuffled(prompt: Prompt, seed: int) -> Prompt:
    for name, medium in MEDIA.items():
        if items := prompt.items(name):
            prompt = prompt.with_items(name, [medium.shuffled(files, seed) for files in items])
    return prompt


def _measure_media(asked: Questions, encoder: Encoder, kinds: Sequence[Kind], view: View) -> None:
    """Add for each medium a short prompt whose items are replaced by items of each awkward size."""
    for name, medium in MEDIA.items():
        prompts = [prompt for kind in kinds for prompt in kind.shown if prompt.items(name)]
        if not prompts:
            continue
        fewest = min(len(prompt.items(name)) for prompt in prompts)
        few = [prompt for prompt in prompts if len(prompt.items(name)) == fewest]
        prompt = min(few, key=lambda one: len(str(one.messages)))
        for size, (files, width, height) in medium.awkward(encoder.pixels).items():
            item = (draw(None, (width, height)),) * files
            try:
                encoded = _through(encoder, prompt.with_items(name, [item] * len(prompt.items(name))), view)
            except BAD_ROW as error:
                asked.unusable[prompt.key] = str(error)
                continue
            if not encoded.prompt.is_visual:  # a view that hides the medium needs no question
                continue
            token = encoder.tokens[medium.slot]
            shape = f"{width}x{height}" if files == 1 else f"{files} of {width}x{height}"
            asked.sizes.append(Sized(size, shape, encoded, encoded.expanded.count(token), token, medium))


def _spell(asked: Questions, encoder: Encoder, kinds: Sequence[Kind], view: View) -> None:
    """Add a short prompt of each modality whose texts and key spell the end token and the placeholders."""
    words = encoder.tokenizer.eos_token + "".join(encoder.tokenizer.convert_ids_to_tokens(encoder.tokens.values()))
    for modality in sorted({kind.modality for kind in kinds}):
        shown = (prompt for kind in kinds if kind.modality == modality for prompt in kind.shown)
        prompt = min(shown, key=lambda one: sum(len(file) for _, files in shown_items(one) for file in files))
        parts = [{"type": name} for name in MEDIA for _ in prompt.items(name)]
        message = {"role": "user", "content": [*parts, {"type": "text", "text": words}]}
        spelled = replace(prompt, messages=(message,), answer=words, extra=dict.fromkeys(prompt.extra, words))
        try:
            asked.spelled.append(_through(encoder, spelled, view))
        except BAD_ROW as error:
            asked.unusable[prompt.key] = str(error)


def _find_longest(asked: Questions, encoder: Encoder, routed: Sequence[tuple[Kind, View]]) -> None:
    encoded = 0
    for kind, view in routed:
        for prompt in kind.longest:
            try:
                shown = _through(encoder, prompt, view)
                if asked.longest is None or len(shown.expanded) > len(asked.longest.expanded):
                    check_items(prompt)
            except BAD_ROW as error:
                asked.unusable[prompt.key] = str(error)
                continue
            encoded += 1
            if asked.longest is None or len(shown.expanded) > len(asked.longest.expanded):
                asked.longest = shown
    rows = sum(kind.rows for kind, _ in routed)
    unreadable = sum(kind.unreadable for kind, _ in routed)
    asked.looked = f"the longest of {encoded:,} prompts" + (f", the largest of {rows:,}" if rows > encoded else "")
    asked.looked += f"; {unreadable} rows cannot be read" if unreadable else ""


def _through(encoder: Encoder, prompt: Prompt, view: View) -> Encoded:
    return encode_view(encoder, encoder.encode(prompt), view)


def _different(views: Iterable[View]) -> list[View]:
    found: list[View] = []
    for view in views:
        if view not in found:
            found.append(view)
    return found
