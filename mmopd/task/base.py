"""A task: its name, its modality, the form of its prompts, the verifier of its answers; one file of `modalities/`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from mmopd.config import View
from mmopd.records import UNKNOWN, Message, Outcome, Prompt

Verify = Callable[[str, str], Outcome]  # (response text, answer key) -> outcome
Template = Callable[[str, int], Sequence[Message]]  # (question, number of images or other items) -> chat messages


def user_turn(question: str, images: int, part: str = "image") -> Sequence[Message]:
    """Return one user message: the images, or parts of another medium such as `video`, then the question."""
    parts: list[Message] = [{"type": part}] * images
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def unverified(response: str, answer: str) -> Outcome:
    """Return an unknown outcome; the verifier of a task without one."""
    return Outcome(UNKNOWN, "no verifier")


@dataclass(frozen=True, slots=True)
class Task:
    """The form of prompts of one kind, and the verifier of their answers.

    Converters call `prompt` when shards are written. A run calls `verify` on the student's answers, in another process,
    so the verifier may be slow, crash or hang (`mmopd.task.verifier_pool`).
    """

    name: str  # its name in rows, routes and mixtures
    modality: str  # text, or the name of a medium
    verify: Verify = unverified
    messages: Template = user_turn
    timeout: float | None = None  # seconds for one answer; the pool's default if not set
    # what a teacher may see of its prompts, in addition to the built-in views
    views: Mapping[str, View] = field(default_factory=dict)

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
        """Return one row for `write_shards`.

        Args:
            images: encoded files, in the order of display.
            extra: texts for views.
            videos: clips, each as its encoded frames in order, two per second.
            others: items of other media by the medium's name, each as its encoded files.
        """
        given = {**(others or {}), "video": videos}
        items = {medium: tuple(map(tuple, some)) for medium, some in given.items() if some}
        messages = tuple(self.messages(question, len(images) + sum(map(len, items.values()))))
        return Prompt(key, self.name, self.modality, messages, tuple(images), answer, dict(extra or {}), items)
