"""Turn prompts into token ids and pixels, counted in one place for student, teachers and trainer."""

from typing import TYPE_CHECKING

from mmopd.lazy import importer

if TYPE_CHECKING:
    from mmopd.modality.base import Medium, Reader
    from mmopd.modality.encode import Encoder
    from mmopd.modality.pixels import PixelPolicy

__all__ = ["Encoder", "Medium", "PixelPolicy", "Reader"]

__getattr__ = importer(
    __name__,
    {
        "Encoder": "mmopd.modality.encode",
        "Medium": "mmopd.modality.base",
        "PixelPolicy": "mmopd.modality.pixels",
        "Reader": "mmopd.modality.base",
    },
)
