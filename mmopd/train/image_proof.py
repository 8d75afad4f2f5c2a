"""Prove before the first step that the trainer sees what prompts show.

A version of transformers that drops the vision tower's output raises no error: the student would learn without seeing
one image.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import islice

from torch import Tensor

from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.modality.registry import MEDIA, check_items
from mmopd.prompts.rows import RowError
from mmopd.prompts.shards import Shards
from mmopd.records import Prompt
from mmopd.train.prefix_tree import Item
from mmopd.train.weight_probe import to_probe

TRIED = 3  # prompts of a medium before it counts as unseen: one may show an even grey
SAME = 1e-6  # nats; the two passes have equal shapes, so that a student which sees nothing gives equal numbers


def prove_sight(
    logprobs: Callable[[Sequence[Item]], list[Tensor]], sources: Sequence[Shards], encoder: Encoder
) -> None:
    """Compare the student's log-probs of an answer after its image with those after an even grey of the same size.

    Each medium of the mixture is tried, images and clips. Every rank must call this.

    Args:
        logprobs: returns log-probs [T] of each item's tokens by the trainer; collective.
        sources: the prompts.
        encoder: of the student.

    Raises:
        UserError: they are the same, on all ranks.
    """
    for medium in MEDIA:
        prompts = list(islice(_showing(medium, sources), TRIED))
        if prompts and not any(_sees(logprobs, prompt, encoder) for prompt in prompts):
            raise UserError(
                f"the trainer does not see the {MEDIA[medium].items} of its prompts: the log-probs of the answer to "
                f"{prompts[0].key} are the same if its {MEDIA[medium].item} is replaced by an even grey. "
                f"transformers {version('transformers')} drops the output of the vision tower: install a version that "
                "mmopd names in its dependencies (`pip install --upgrade mmopd`)"
            )


def _sees(logprobs: Callable[[Sequence[Item]], list[Tensor]], prompt: Prompt, encoder: Encoder) -> bool:
    blank = prompt
    for name, medium in MEDIA.items():
        blank = blank.with_items(name, [medium.redraw(files, None, blank=True) for files in prompt.items(name)])
    # One item a call: equal shapes give equal sums.
    (seen,) = logprobs([to_probe(prompt, encoder)])
    (unseen,) = logprobs([to_probe(blank, encoder)])
    return not float((seen - unseen).abs().max()) <= SAME  # NaN is for the weight probe to report


def _showing(medium: str, sources: Sequence[Shards]) -> Iterator[Prompt]:
    """Yield prompts that have an item of a medium, in the order of the sources."""
    for shards in sources:
        if any(modality != "text" for _, modality in shards.kinds):
            for row in range(len(shards)):
                with suppress(RowError, ValueError):  # it is replaced when it is drawn
                    if (prompt := shards[row]).items(medium):
                        check_items(prompt)
                        yield prompt
