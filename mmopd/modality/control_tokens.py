"""Keep the control tokens of a chat template apart from text that spells them.

Every added token of the tokenizer is a control token here, with or without the flag `special`. A control token comes
from the chat template alone; text of a row that spells one is tokenized as any other text (decision 020).
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from mmopd.records import Message

MARKS = 0xDC00  # lone surrogates: no text that can be tokenized has them


class ControlTokens:
    """The added tokens of a tokenizer, each of which is its exact spelling, as all of Qwen's are.

    To tell them apart, the first character of every one is exchanged for a mark in all texts of the messages, before
    the template is rendered. A token that is whole afterwards was written by the template.

    Attributes:
        spellings: of all control tokens, in the order of their ids.

    Args:
        tokenizer: a tokenizer of transformers with a backend of `tokenizers`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: dict[str, int] = {str(token): i for i, token in sorted(tokenizer.added_tokens_decoder.items())}
        self.spellings = tuple(self._ids)
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._any = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        firsts = sorted({ord(spelling[0]) for spelling in self._ids})
        self._marks = {first: MARKS + i for i, first in enumerate(firsts)}
        self._marked = {mark: first for first, mark in self._marks.items()}

    def spelled_in(self, messages: Iterable[Message]) -> bool:
        """Return true if a text of the messages spells a control token, or if neighbouring parts together do."""
        return any(self._any.search(text) for message in messages for text in (*_strings(message), _joined(message)))

    def mark(self, messages: Iterable[Message]) -> list[Message]:
        """Return the messages with marked texts, in which a chat template finds no control token."""
        return [self._mark(message) for message in messages]

    def encode(self, rendered: str) -> list[int]:
        """Return the ids of a chat template that was rendered with marked messages."""
        pieces = self._any.split(rendered)  # text, control token, text, ...
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            ids += [self._ids[piece]] if i % 2 else self.encode_text(piece.translate(self._marked))
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Return the ids of a text in which nothing is a control token."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    @cached_property
    def _plain(self) -> Tokenizer:
        """The same tokenizer without added tokens (`split_special_tokens` only ignores those that are `special`)."""
        own = self._tokenizer.backend_tokenizer
        plain = Tokenizer(own.model)
        plain.normalizer = own.normalizer
        plain.pre_tokenizer = own.pre_tokenizer
        return plain

    def _mark(self, value: Any) -> Any:
        if isinstance(value, str):
            return value.translate(self._marks)
        if isinstance(value, Mapping):
            return {self._mark(key): self._mark(one) for key, one in value.items()}
        return [self._mark(one) for one in value] if isinstance(value, list | tuple) else value


def _strings(value: Any) -> Iterator[str]:
    """Yield all strings of a message, keys too; a chat template may show any of them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in (*value, *value.values()) if isinstance(value, Mapping) else value:
            yield from _strings(one)


def _joined(message: Message) -> str:
    """Return the text of a message as templates write it: its parts one after the other."""
    content: str | Sequence[Message] = message.get("content") or ""
    return content if isinstance(content, str) else "".join(str(part.get("text", "")) for part in content)
