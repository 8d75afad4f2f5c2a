"""The student as a HF folder that transformers and vLLM load."""

import shutil
from pathlib import Path

from mmopd.train.engine import Trainer

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")


def export(trainer: Trainer, target: Path) -> Path:
    """Write weights, configuration, processor, tokenizer and generation settings to `target`; collective.

    Written under a temporary name and then renamed, so `target` is whole or what it was before.
    Everything but the weights and their configuration is the source folder's own, unchanged.
    """
    state = {name: weight.detach().to("cpu", copy=True) for name, weight in trainer.named_weights()}
    if trainer.ranks.rank == 0:
        torn = target.with_name(f".{target.name}.partial")
        shutil.rmtree(torn, ignore_errors=True)
        trainer.student.save_pretrained(torn, state_dict=state)
        _complete(torn, trainer.source)
        shutil.rmtree(target, ignore_errors=True)
        torn.rename(target)
    trainer.ranks.barrier()
    return target


def _complete(folder: Path, source: Path) -> None:
    """Copy what the model needs besides weights and configuration."""
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json" and not any(file.match(pattern) for pattern in WEIGHTS):
            shutil.copyfile(file, folder / file.name)
