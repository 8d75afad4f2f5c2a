"""A task: its name, its modality, how its prompts are put, and who judges the answers. One file of `modalities/` each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mmopd.config import View
from mmopd.records import UNKNOWN, Message, Outcome, Prompt

Verify = Callable[[str, str], Outcome]  # (response text, answer key) -> outcome
Template = Callable[[str, int], Sequence[Message]]  # (question, number of images, or of clips) -> chat messages


def user_turn(question: str, images: int, part: str = "image") -> Sequence[Message]:
    """One user message: the images, or parts of another type such as `video`, then the question."""
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
    modality: str  # text | image | video
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
    ) -> Prompt:
        """One row for `write_shards`.

        Args:
            images: encoded files, in the order in which they are shown.
            extra: texts for views.
            videos: clips, each the encoded frames in their order, two a second.
        """
        messages = tuple(self.messages(question, len(images) + len(videos)))
        return Prompt(
            key, self.name, self.modality, messages, tuple(images), answer, dict(extra or {}), tuple(map(tuple, videos))
        )
