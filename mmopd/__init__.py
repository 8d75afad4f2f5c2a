"""mmopd: multimodal on-policy distillation from several teachers."""

__version__ = "0.1.0"
