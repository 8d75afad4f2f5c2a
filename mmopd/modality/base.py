"""Definition of a medium: visual content of a prompt, such as an image or a clip.

An item of a medium is a tuple of files, each an encoded image (PNG, JPEG, ...): one file for an image, the frames for a
clip. A medium is one file of this package and one line in `registry.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from mmopd.modality.pixels import PixelPolicy
from mmopd.records import Files, Grid

if TYPE_CHECKING:  # importing torch takes seconds, and limits and names do not need it
    from torch import Tensor


class Reader(ABC):
    """Counts and decodes the items of one medium as one model's processor does.

    Attributes:
        token: the id that stands for an item in a prompt, and for each of its visual tokens.
    """

    token: int

    @abstractmethod
    def grid(self, files: Files, budget: PixelPolicy | None = None) -> Grid:
        """Return the patches of an item, from the headers of its files.

        Args:
            budget: what images are resized to instead of the processor's own budget.

        Raises:
            ValueError: the item cannot be opened or is out of bounds.
        """

    @abstractmethod
    def tokens(self, grid: Grid) -> int:
        """Return the visual tokens of a grid."""

    @abstractmethod
    def expand(self, files: Files, grid: Grid) -> Sequence[int]:
        """Return the ids that replace the item's placeholder."""

    @abstractmethod
    def pixel_values(self, items: Sequence[Files], grids: Sequence[Grid]) -> "list[Tensor]":
        """Return the patches of the items in order, as one or more tensors [patches, channels * time * patch * patch].

        Raises:
            ValueError: the processor cuts an item into another grid.
            OSError: a file ends before its pixels do, or they are damaged.
        """


class Medium(ABC):
    """One kind of visual content: how its items are stored, bounded, counted, decoded, sent and packed.

    Attributes:
        name: the type of its parts in messages.
        item, items, files: what messages to people call one, several, and the files of one.
        slot: the input of the model that it goes into: the type of a part in the chat template, of a content part of
            vLLM (`SLOT_url`), and the key of transformers' `SLOT_grid_thw` and `mm_encoder_outputs`.
        placeholder: the token of the slot.
        token_type: the slot in transformers' `mm_token_type_ids`.
        pattern: regular expression of its files in a tar, without their key; the groups `item` and `file` are numbers.
        member_form: the same for people.
        counts: the field of a row's json with the number of files of each item; None for images, which are the files
            that belong to no other medium. A row with a counted medium has that medium's name as its modality.
        limit: the field of `Engine` that says how many items a prompt may have; None if servers need no limit.
        io_settings: the slot's entry of vLLM's `--media-io-kwargs`.
        differs: what else differs if a server counts as many visual tokens in another way.
    """

    name: ClassVar[str]
    item: ClassVar[str]
    items: ClassVar[str]
    files: ClassVar[str]
    slot: ClassVar[str]
    placeholder: ClassVar[str]
    token_type: ClassVar[int]
    pattern: ClassVar[str]
    member_form: ClassVar[str]
    counts: ClassVar[str | None] = None
    limit: ClassVar[str | None] = None
    io_settings: ClassVar[Mapping[str, Any]] = {}
    differs: ClassVar[str] = ""

    @abstractmethod
    def member(self, item: int, file: int) -> str:
        """Return the name of a file in a tar, without key and format."""

    @abstractmethod
    def check(self, files: Files, *, decode: bool = False) -> list[tuple[str, tuple[int, int]]]:
        """Return (format, (width, height)) of each file of an item; bounds are checked before anything is decoded.

        Args:
            decode: read the pixels too.

        Raises:
            ValueError: student, teachers and trainer cannot all use the item.
        """

    @abstractmethod
    def reader(self, processor: Any) -> Reader:
        """Return its reader for a model's processor.

        Raises:
            ValueError: the processor does not take this medium.
        """

    @abstractmethod
    def url(self, files: Files) -> bytes:
        """Return an item as the data URL that vLLM reads."""

    @abstractmethod
    def redraw(self, files: Files, budget: PixelPolicy | None, *, blank: bool) -> Files:
        """Return an item in the size of a pixel budget, or in its own; an even grey if `blank`.

        The number of visual tokens does not change.

        Raises:
            ValueError: the medium has no pixel budget, or the item cannot be opened.
            OSError: its pixels do not decode.
        """

    @abstractmethod
    def shuffled(self, files: Files, seed: int) -> Files:
        """Return the same content in another order, for the canary of the preflight."""

    @abstractmethod
    def awkward(self, pixels: PixelPolicy) -> dict[str, tuple[int, int, int]]:
        """Return (files, width, height) by name, which servers with other settings read differently.

        Args:
            pixels: the student's own budget for images.
        """
