"""Encode prompts as token ids: the chat template, and the number of visual tokens of each item of a medium.

The arithmetic is that of the processor which trainer and servers run (transformers; qwen-vl-utils rounds thin images to
other sizes), on image headers alone; pixels are decoded only where a trainer needs them. Servers expand placeholders
themselves; their answer is compared with `Encoded.expanded`.
"""

import json
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mmopd.errors import CheckpointError
from mmopd.modality.base import Medium, Reader
from mmopd.modality.control_tokens import ControlTokens
from mmopd.modality.pixels import PixelPolicy
from mmopd.modality.registry import MEDIA, shown_items, slots
from mmopd.model_folder import load_processor
from mmopd.records import Encoded, Message, Prompt

RENDER_SECONDS = 30.0  # for one prompt; templates take about a millisecond
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>")


class Encoder:
    """Turns prompts into ids and pixels with the student's own processor.

    Attributes:
        sees: false for a language model, which has no processor of images.
        tokens: the placeholder of each input of the model; empty for a language model.
        control: the control tokens, which come from the chat template and never from a text of a row.

    Args:
        model: HF folder with processor, tokenizer and chat template; a language model has no processor.
    """

    def __init__(self, model: Path) -> None:
        self._model = model
        self.processor: Any = load_processor(model)  # the tokenizer itself, if the folder has no other processor
        self.sees = hasattr(self.processor, "image_processor")
        self.tokenizer: Any = self.processor.tokenizer if self.sees else self.processor
        self.control = ControlTokens(self.tokenizer)
        placeholders = {slot: media[0].placeholder for slot, media in slots().items()}
        self.tokens: dict[str, int] = {
            slot: self.tokenizer.convert_tokens_to_ids(token) for slot, token in placeholders.items() if self.sees
        }
        self.image_token = self.tokens.get("image", 0)
        vocabulary = self.tokenizer.get_vocab()
        control = (*VISION_TOKENS, *placeholders.values())
        self.banned: tuple[int, ...] = tuple(vocabulary[token] for token in control if token in vocabulary)
        self._readers: dict[str, Reader] = {}

    @cached_property
    def pixels(self) -> PixelPolicy:
        """The rule by which images become visual tokens; not for a language model."""
        images = self.processor.image_processor
        return PixelPolicy(
            images.patch_size, images.merge_size, images.size["shortest_edge"], images.size["longest_edge"]
        )

    @cached_property
    def head(self) -> int:
        """Rows of the model's output head; as many as there are tokens, if the folder has no model."""
        return head_rows(self._model) or len(self.tokenizer)

    @cached_property
    def without_token(self) -> frozenset[int]:
        """Ids of the head that the tokenizer has no token for: the padding of its height."""
        return frozenset(range(self.head)) - set(self.tokenizer.get_vocab().values())

    def reader(self, medium: Medium) -> Reader:
        """Return the reader of a medium for this processor.

        Raises:
            ValueError: the processor does not take this medium.
        """
        if medium.name not in self._readers:
            self._readers[medium.name] = medium.reader(self.processor)
        return self._readers[medium.name]

    def encode(self, prompt: Prompt, pixels: PixelPolicy | None = None) -> Encoded:
        """Return the ids of the prompt, up to and including the assistant's header.

        A text of a row that spells a control token is text, whatever its role.

        Args:
            pixels: the budget that images are resized to, if it is not the student's.

        Raises:
            ValueError: an item that cannot be opened, more or fewer items than placeholders, or a medium that the
                processor does not take.
            CheckpointError: the chat template does not end.
        """
        messages = _with_slots(prompt.messages) if self.sees else _as_text(prompt)
        if spelled := self.control.spelled_in(messages):
            messages = self.control.mark(messages)
        try:
            with _time_limit(RENDER_SECONDS):
                text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TimeoutError:
            raise CheckpointError(
                f"{self._model}: its chat template did not end within {RENDER_SECONDS:g} s for {prompt.key}: use "
                "another template"
            ) from None
        except Exception as error:  # a template may raise anything about messages that it does not expect
            raise ValueError(f"{prompt.key}: its messages do not fit the chat template: {error}") from error
        ids: list[int] = self.control.encode(text) if spelled else self.tokenizer.encode(text, add_special_tokens=False)
        self._check_placeholders(prompt, ids)
        shown = [(self.reader(medium), files) for medium, files in shown_items(prompt)]
        grids = tuple(reader.grid(files, pixels) for reader, files in shown)
        becomes: dict[int, list[Sequence[int]]] = {}
        for (reader, files), grid in zip(shown, grids, strict=True):
            becomes.setdefault(reader.token, []).append(reader.expand(files, grid))
        return Encoded(prompt, tuple(ids), expand(ids, becomes), grids)

    def _check_placeholders(self, prompt: Prompt, ids: Sequence[int]) -> None:
        """Check that each input of the model has as many placeholders as items, all of one medium."""
        if not self.sees:
            return
        for slot, media in slots().items():
            there = [medium for medium in media if prompt.items(medium.name)]
            if len(there) > 1:
                names = " and ".join(medium.items for medium in there)
                raise ValueError(f"{prompt.key}: {names} in one prompt share a placeholder; use one of them")
            medium = there[0] if there else media[0]
            placeholders = ids.count(self.tokens[slot])
            n = len(prompt.items(medium.name))
            if placeholders != n:
                raise ValueError(f"{prompt.key}: {placeholders} {slot} placeholders for {n} {medium.items}")

    def encode_answer(self, answer: str) -> tuple[int, ...]:
        """Return the ids of an answer key as a response to its prompt, with the end token."""
        return (*self.control.encode_text(answer), int(self.tokenizer.eos_token_id))

    def decode(self, tokens: tuple[int, ...]) -> str:
        """Return the text of response tokens, without control tokens."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text

    def pixel_values(self, encoded: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (pixels, grids [I, 3]) of all items of a prompt, in the order of `shown_items`.

        Pixels are [patches, channels * time * patch * patch].

        Raises:
            ValueError: the processor cuts an item into another grid than `encode` counted.
        """
        pixels: list[torch.Tensor] = []
        grids = iter(encoded.grids)
        for medium in MEDIA.values():
            if not (items := encoded.prompt.items(medium.name)):
                continue
            counted = [next(grids) for _ in items]
            try:
                pixels += self.reader(medium).pixel_values(items, counted)
            except ValueError as error:
                raise ValueError(f"{encoded.prompt.key}: {error}") from error
        return torch.cat(pixels) if len(pixels) > 1 else pixels[0], torch.tensor(encoded.grids)


def head_rows(model: Path) -> int | None:
    """Return the rows of a model's output head by its config.json; None if it does not say.

    Models of one family have the same tokens and heads of different height (Qwen2.5-VL 7B: 152,064 rows, 3B: 151,936).
    """
    path = model / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows: int | None = {**config, **(config.get("text_config") or {})}.get("vocab_size")
    return rows


def expand(ids: Sequence[int], becomes: Mapping[int, Iterable[Sequence[int]]]) -> tuple[int, ...]:
    """Return the ids with their placeholders replaced.

    Args:
        becomes: placeholder -> what each of its occurrences becomes, in order.
    """
    expanded: list[int] = []
    waiting = {token: iter(items) for token, items in becomes.items()}
    for i in ids:
        if i in waiting:
            expanded += next(waiting[i])
        else:
            expanded.append(i)
    return tuple(expanded)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after a time. Without effect in other threads than the main one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)


def _with_slots(messages: Sequence[Message]) -> list[Message]:
    """Return the messages as chat templates know them: each medium's part has the type of its model input."""
    return [
        {**message, "content": [_with_slot(part) for part in content]}
        if isinstance(content := message.get("content"), list | tuple)
        else message
        for message in messages
    ]


def _as_text(prompt: Prompt) -> list[Message]:
    """Return the messages as chat templates of language models know them: each content is one text.

    Raises:
        ValueError: the prompt shows something.
    """
    parts = [
        part.get("type")
        for message in prompt.messages
        if not isinstance(message.get("content"), str)
        for part in message.get("content") or ()
    ]
    if shown := [name for name in MEDIA if name in parts or prompt.items(name)]:
        raise ValueError(f"{prompt.key}: it shows {MEDIA[shown[0]].items}, and the student is a language model")
    return [
        {**message, "content": "".join(str(part.get("text", "")) for part in content)}
        if isinstance(content := message.get("content"), list | tuple)
        else message
        for message in prompt.messages
    ]


def _with_slot(part: Message) -> Message:
    medium = MEDIA.get(part.get("type", ""))
    return part if medium is None else {**part, "type": medium.slot}
