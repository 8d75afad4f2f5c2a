"""From prompts to token ids and pixels, counted in one place for student, teachers and trainer."""

from typing import TYPE_CHECKING

from mmopd.lazy import importer

if TYPE_CHECKING:
    from mmopd.modality.encode import Encoder
    from mmopd.modality.image import PixelPolicy

__all__ = ["Encoder", "PixelPolicy"]

__getattr__ = importer(__name__, {"Encoder": "mmopd.modality.encode", "PixelPolicy": "mmopd.modality.image"})
