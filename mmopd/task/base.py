"""A task: its name, its modality, how its prompts are put, and who judges the answers; one file of `modalities/`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mmopd.config import View
from mmopd.records import UNKNOWN, Message, Outcome, Prompt

Verify = Callable[[str, str], Outcome]  # (response text, answer key) -> outcome
Template = Callable[[str, int], Sequence[Message]]  # (question, number of items to see) -> chat messages


def user_turn(question: str, images: int, part: str = "image") -> Sequence[Message]:
    """One user message: the images, or parts of another medium such as `video`, then the question."""
    parts: list[Message] = [{"type": part}] * images
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def unverified(response: str, answer: str) -> Outcome:
    """Of a task without a verifier: every outcome is unknown."""
    return Outcome(UNKNOWN, "no verifier")


@dataclass(frozen=True, slots=True)
class Task:
    """What makes prompts of one kind and judges their answers.

    A task acts at two times: converters call `prompt` when shards are written; a run calls `verify` on what the student
    answers, in another process, so that it may be slow, crash or hang (`mmopd.task.verifier_pool`).
    """

    name: str  # as rows, routes and mixtures call it
    modality: str  # text, or the name of a medium
    verify: Verify = unverified
    messages: Template = user_turn
    timeout: float | None = None  # seconds for one answer; the pool's own if not set
    views: Mapping[str, View] = field(
        default_factory=dict
    )  # what a teacher may be shown of its prompts, beside the built-in views

    def prompt(
        self,
        key: str,
        question: str,
        answer: str,
        images: Sequence[bytes] = (),
        extra: Mapping[str, str] | None = None,
        *,
        videos: Sequence[Sequence[bytes]] = (),
        others: Mapping[str, Sequence[Sequence[bytes]]] | None = None,
    ) -> Prompt:
        """One row for `write_shards`.

        Args:
            images: encoded files, in the order in which they are shown.
            extra: texts for views.
            videos: clips, each the encoded frames in their order, two a second.
            others: items of further media by the medium's name, each its encoded files.
        """
        given = {**(others or {}), "video": videos}
        items = {medium: tuple(map(tuple, some)) for medium, some in given.items() if some}
        messages = tuple(self.messages(question, len(images) + sum(map(len, items.values()))))
        return Prompt(key, self.name, self.modality, messages, tuple(images), answer, dict(extra or {}), items)
