"""From prompts to token ids and pixels, counted in one place for student, teachers and trainer."""

from mmopd.modality.encode import Encoder
from mmopd.modality.image import PixelPolicy

__all__ = ["Encoder", "PixelPolicy"]
