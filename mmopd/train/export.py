"""Export the student as a HF folder that transformers and vLLM load."""

import shutil
from pathlib import Path

from safetensors import SafetensorError

from mmopd.report.model_card import CARD
from mmopd.train.lora import save_adapter
from mmopd.train.trainer import Trainer

ADAPTER = "adapter"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth")


def export(trainer: Trainer, target: Path, card: str = "") -> Path:
    """Write weights, configuration, processor, tokenizer and generation settings to `target`; collective.

    The folder is written under a temporary name and then renamed, so `target` is complete or absent. Everything but the
    weights and their configuration is copied from the source folder. Trained adapters are merged into the weights, and
    also written to `target/adapter` as a peft folder for the source model.

    Args:
        card: the text of README.md; the source's own describes another model.

    Raises:
        CheckpointError: it cannot be written; raised on all ranks.
    """
    state = {name: weight.detach().to("cpu", copy=True) for name, weight in trainer.named_weights()}
    torn = target.with_name(f".{target.name}.partial")
    writes = trainer.ranks.rank == 0
    fault = ""
    try:
        if writes:
            shutil.rmtree(torn, ignore_errors=True)
        if trainer.settings.lora is not None:  # all ranks gather, rank 0 writes
            save_adapter(trainer.student, trainer.settings.lora, trainer.source, torn / ADAPTER, write=writes)
        if writes:
            # The state has the checkpoint's format already.
            trainer.student.save_pretrained(torn, state_dict=state, save_original_format=False)
            _complete(torn, trainer.source)
            if card:
                (torn / CARD).write_text(card, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        fault = f"{target}: the student was not written: {error}"
    trainer.ranks.agree(fault)
    if writes:
        shutil.rmtree(target, ignore_errors=True)
        torn.rename(target)
    trainer.ranks.barrier()
    return target


def _complete(folder: Path, source: Path) -> None:
    """Copy what the model needs besides weights and configuration."""
    for file in source.iterdir():
        if (
            file.is_file()
            and file.name not in {"config.json", CARD}
            and not any(file.match(pattern) for pattern in WEIGHTS)
        ):
            shutil.copyfile(file, folder / file.name)
