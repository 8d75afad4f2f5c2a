"""Counts the tokens of prompts for a given student: once, when shards are written; the index keeps the counts."""

from pathlib import Path
from typing import Protocol

from mmopd.records import Prompt
from mmopd.runtime.fingerprint import hash_files

PROCESSOR_FILES = (
    "*processor_config.json",
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map*",
    "added_tokens*",
    "chat_template*",
)


def hash_processor(model: Path) -> str:
    """Hash the tokenizer, the chat template and the pixel policy of a model's folder, without its weights."""
    return hash_files(sorted({path for pattern in PROCESSOR_FILES for path in model.glob(pattern) if path.is_file()}))


class Counter(Protocol):
    """Counts the tokens of a prompt."""

    @property
    def processor(self) -> str:
        """`hash_processor` of the model for which tokens are counted."""

    def __call__(self, prompt: Prompt) -> tuple[int, int]:
        """Count (text tokens, visual tokens) of a prompt; their sum is its length.

        The prompt ends with the assistant's header. All that a placeholder becomes counts as visual, such as the times
        of a clip's frames.

        Raises:
            ValueError: the processor cannot take the prompt.
        """


class TokenCounter:
    """A `Counter` with the processor of a model's folder.

    Raises:
        CheckpointError: the folder has no processor.
    """

    def __init__(self, model: Path) -> None:
        from mmopd.modality import Encoder  # imports transformers, which takes seconds

        self._encoder = Encoder(model)
        self.processor = hash_processor(model)

    def __call__(self, prompt: Prompt) -> tuple[int, int]:
        """Count as `Counter` says."""
        encoded = self._encoder.encode(prompt)
        text = len(encoded.ids) - len(encoded.grids)
        return text, len(encoded.expanded) - text
