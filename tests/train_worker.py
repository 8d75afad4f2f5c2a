"""A training rank for tests: `python train_worker.py MODEL OUT JOB`, with RANK etc. in the environment; rank 0 writes OUT/JOB.pt.

Also what both sides share: the items, and a launcher.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmopd.config import Algorithm, Train
from mmopd.demo.world import additions, digit_sums
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.records import Prompt
from mmopd.train.checkpoint import Checkpoints, load
from mmopd.train.distributed import start, stop
from mmopd.train.engine import Trainer
from mmopd.train.export import export
from mmopd.train.pack import Item

TRAIN = Train(
    steps=8, dtype="float32", lr=1e-3, warmup=1, micro_tokens=80, micro_patches=64, gradient_checkpointing=False, checkpoint_every=2
)


def make_items(encoder: Encoder, kinds: str, seed: int) -> list[Item]:
    """One item per letter: `t` is a text prompt, `i` an image prompt; two responses of uneven length for each capital letter."""
    random = torch.Generator().manual_seed(seed)
    items = []
    for k, kind in enumerate(kinds):
        row = (digit_sums if kind in "iI" else additions)("train", k + 1, seed)[k]
        prompt = Prompt(f"{kind}/{seed}-{k}", "task", "image" if kind in "iI" else "text", tuple(row["messages"]), tuple(row["images"]), "")
        encoded = encoder.encode(prompt)
        for _ in range(1 + kind.isupper()):
            T = int(torch.randint(2, 24, (1,), generator=random))
            tokens = tuple(torch.randint(5, 900, (T,), generator=random).tolist())
            old = -7 + 0.3 * torch.randn(T, generator=random)
            items.append(Item(encoded, tokens, old, torch.randn(T, generator=random), torch.full((T,), 1 / T / len(kinds))))
    return items


BATCHES = ["TitIIt", "t", "iTtI", "IIi"]  # the second leaves one rank of two with a dummy micro-batch


def main(model: Path, out: Path, job: str) -> None:
    torch.set_num_threads(1)
    ranks = start(60)
    encoder = Encoder(model)
    trainer = Trainer(model, encoder, TRAIN, Algorithm(), ranks)
    result = JOBS[job](trainer, encoder, out)
    if ranks.rank == 0:
        torch.save(result, out / f"{job}.pt")
    ranks.barrier()
    stop()


def straight(trainer: Trainer, encoder: Encoder, out: Path) -> dict[str, Any]:
    """Log-probs before, four updates with a checkpoint after the second, export, log-probs after; then what is refused."""
    before = trainer.logprobs(make_items(encoder, "TiI", 7))
    names = [name for name, _ in trainer.named_weights(1 << 16)]
    checkpoints = Checkpoints(out / "checkpoints", keep=2)
    stats = []
    for k, kinds in enumerate(BATCHES):
        if k == 2:
            checkpoints.save(trainer, k, {"position": 17})
        stats.append(trainer.update(make_items(encoder, kinds, k)))
    export(trainer, out / "export")
    after = trainer.logprobs(make_items(encoder, "TiI", 7))
    items = make_items(encoder, "Ti", 3)
    infinite = Item(items[0].encoded, items[0].tokens, items[0].old, items[0].advantage / 0, items[0].weight)
    errors = {"infinite": _refusal(lambda: trainer.update([infinite, *items[1:]]))}
    if trainer.ranks.size == 1:
        errors["two ranks"] = _refusal(lambda: load(trainer, out / "of-two-ranks"))
    unchanged = all(map(torch.equal, after, trainer.logprobs(make_items(encoder, "TiI", 7))))
    return {"stats": stats, "before": before, "names": names, "after": after, "errors": errors, "unchanged": unchanged}


def resumed(trainer: Trainer, encoder: Encoder, out: Path) -> dict[str, Any]:
    """What goes wrong with broken checkpoints; then the whole one, and its two remaining updates."""
    checkpoints = Checkpoints(out / "checkpoints", keep=2)
    path = checkpoints.latest()
    assert path is not None
    errors = [_refusal(lambda p=p: load(trainer, p)) for p in sorted((out / "broken").iterdir())]
    state = load(trainer, path)
    stats = [trainer.update(make_items(encoder, kinds, k)) for k, kinds in enumerate(BATCHES) if k >= 2]
    for step in (3, 4):
        checkpoints.save(trainer, step, {})
    kept = sorted(p.name for p in checkpoints.folder.iterdir())
    return {"stats": stats, "state": state, "errors": errors, "kept": kept, "after": trainer.logprobs(make_items(encoder, "TiI", 7))}


JOBS: dict[str, Callable[[Trainer, Encoder, Path], dict[str, Any]]] = {"straight": straight, "resumed": resumed}


def _refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except UserError as error:
        return str(error)
    return ""


def launch(model: Path, out: Path, job: str, size: int, port: int) -> dict[str, Any]:
    """Run a job on `size` ranks; returns what rank 0 found."""
    out.mkdir(parents=True, exist_ok=True)
    shared = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    ranks = []
    for rank in range(size):
        env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path}
        with (out / f"{job}-{rank}.log").open("w") as log:
            command = [sys.executable, __file__, str(model), str(out), job]
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    try:
        end = time.monotonic() + 240
        codes = [process.wait(max(1, end - time.monotonic())) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert codes == [0] * size, "\n".join((out / f"{job}-{r}.log").read_text()[-3000:] for r in range(size))
    found: dict[str, Any] = torch.load(out / f"{job}.pt", weights_only=False)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
