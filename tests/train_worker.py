"""A training rank for tests: `main(MODEL, OUT, JOB)`, with RANK etc. in the environment; rank 0 writes OUT/JOB.pt.

It also holds what the tests and the rank share: the items, and a launcher.
"""

import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import annotations  # noqa: F401  (checks the annotations of what is imported after it)
import torch
from forks import start_ranks
from waiting import wait_for_exit

from mmopd.algorithm.settings import Algorithm
from mmopd.catalog import load_recipe
from mmopd.config import Train
from mmopd.demo.world import additions, digit_sums
from mmopd.errors import UserError
from mmopd.modality import Encoder
from mmopd.records import Outcome, Prompt, Response, Sample, Score
from mmopd.runtime.run_folder import RunFolder
from mmopd.runtime.watchdog import Watchdog
from mmopd.train.checkpoint import Checkpoints, load
from mmopd.train.distributed import start, stop
from mmopd.train.export import export
from mmopd.train.loop import learn
from mmopd.train.prefix_tree import Item
from mmopd.train.skipped import SkippingUpdater
from mmopd.train.trainer import NotFiniteError, Trainer

TRAIN = Train(
    steps=8,
    dtype="float32",
    lr=1e-3,
    warmup=1,
    micro_tokens=80,
    micro_patches=64,
    gradient_checkpointing=False,
    checkpoint_every=2,
)


def make_items(encoder: Encoder, kinds: str, seed: int) -> list[Item]:
    """Return one item per letter: `t` is a text prompt, `i` an image prompt; a capital letter gives two responses of
    uneven length. A language model gets text prompts in place of image prompts.
    """
    kinds = kinds if encoder.sees else kinds.translate({ord("i"): "t", ord("I"): "T"})
    random = torch.Generator().manual_seed(seed)
    items = []
    for k, kind in enumerate(kinds):
        row = (digit_sums if kind in "iI" else additions)("train", k + 1, seed)[k]
        prompt = Prompt(
            f"{kind}/{seed}-{k}",
            "task",
            "image" if kind in "iI" else "text",
            tuple(row["messages"]),
            tuple(row["images"]),
            "",
        )
        encoded = encoder.encode(prompt)
        for _ in range(1 + kind.isupper()):
            T = int(torch.randint(2, 24, (1,), generator=random))
            tokens = tuple(torch.randint(5, 900, (T,), generator=random).tolist())
            old = -7 + 0.3 * torch.randn(T, generator=random)
            items.append(
                Item(encoded, tokens, old, torch.randn(T, generator=random), torch.full((T,), 1 / T / len(kinds)))
            )
    return items


BATCHES = ["TitIIt", "t", "iTtI", "IIi"]  # the second gives one rank of two a dummy micro-batch


def main(model_folder: str, out_folder: str, job: str) -> None:
    model = Path(model_folder)
    out = Path(out_folder)
    torch.set_num_threads(1)
    ranks = start(20 if job == "hanging" else 600)
    encoder = Encoder(model)
    trainer = Trainer(model, encoder, TRAIN, Algorithm(), ranks)
    result = JOBS[job](trainer, encoder, out)
    if ranks.rank == 0:
        torch.save(result, out / f"{job}.pt")
    ranks.barrier()
    stop()


def straight(trainer: Trainer, encoder: Encoder, out: Path) -> dict[str, Any]:
    """Compute log-probs, make four updates with a checkpoint after the second, export, and compute log-probs again."""
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
    found = {"stats": stats, "before": before, "names": names, "after": after}
    return found | {
        "others": others(trainer, encoder),
        "learned": learned(trainer, encoder, out),
        "fine": fine(trainer, encoder),
    }


OTHERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_row": {"micro_tokens": 10_000, "micro_patches": 10_000},
    "apart": {"micro_tokens": 36},  # as long as the longest item; the shortest two are 46
    "clipped": {"grad_clip": 1e-3},
    "checkpointed": {"gradient_checkpointing": True},
}


def others(trainer: Trainer, encoder: Encoder) -> dict[str, dict[str, Any]]:
    """Repeat the first update by trainers with other settings. Returns its statistics, its gradient, and how often a
    layer ran for it.
    """
    found = {}
    for name, settings in OTHERS.items():
        other = Trainer(trainer.source, encoder, TRAIN.model_copy(update=settings), Algorithm(), trainer.ranks)
        ran: list[int] = []  # tokens of each call
        other.student.model.language_model.layers[0].mlp.register_forward_pre_hook(
            lambda _, args, ran=ran: ran.append(args[0].shape[1])
        )
        stats = other.update(make_items(encoder, BATCHES[0], 0))
        found[name] = {"stats": stats, "gradient": gradient(other), "ran": ran}
    return found


def gradient(trainer: Trainer) -> torch.Tensor:
    """Return the gradient that AdamW got in its first step, this rank's shard and then the others', in float32."""
    moments = [s["exp_avg"].flatten() for s in trainer.engine.optimizer.optimizer.state.values()]
    return torch.cat(trainer.ranks.gather_objects(torch.cat(moments))) / (1 - trainer.settings.betas[0])


def learned(trainer: Trainer, encoder: Encoder, out: Path) -> dict[str, Any]:
    """Run a step of the loop with recomputed log-probs and two minibatches. Returns the log-probs of the trainer just
    before each update.
    """
    overrides = [
        "train.old_logprobs=recompute",
        "train.minibatches=2",
        "train.warmup=0",
        "train.lr=0.003",
        "algorithm.balance=null",
    ]
    recipe = load_recipe("recipes/demo.yaml", overrides=overrides)
    learner = Trainer(trainer.source, encoder, recipe.train, recipe.algorithm, trainer.ranks)
    items = make_items(encoder, "TIIT", 5)
    prompts = list({item.encoded.prompt.key: item.encoded for item in items}.values())
    samples = [as_sample(item, prompts.index(item.encoded), k) for k, item in enumerate(items)]
    truth, met = learner.logprobs(items), []
    plain = learner.update

    def update(items: Sequence[Item]) -> dict[str, float]:
        met.append((items, learner.logprobs(items)))
        return plain(items)

    learner.update = update  # type: ignore[method-assign]
    batch, updates, seen = learn(recipe, learner, SkippingUpdater(RunFolder(out), learner), samples, prompts, step=3)
    return {"samples": samples, "truth": truth, "batch": batch, "met": met, "updates": updates, "seen": seen}


def as_sample(item: Item, group: int, k: int) -> Sample:
    """Return the item as a rollout of a slightly different engine, right every other time."""
    old = item.old.tolist()
    score = Score("t", tuple(x + a for x, a in zip(old, item.advantage.tolist(), strict=True)))
    return Sample(
        group,
        Response(item.tokens, tuple(old), "", "stop", (("step-3", len(item.tokens)),)),
        Outcome(float(k % 2)),
        score,
    )


def fine(trainer: Trainer, encoder: Encoder) -> dict[str, Any]:
    """Make eight updates in bfloat16 that are each too small for it, and one that is not finite."""
    settings = TRAIN.model_copy(update={"dtype": "bfloat16", "lr": 1e-5, "warmup": 0, "weight_decay": 0.0})
    other = Trainer(trainer.source, encoder, settings, Algorithm(), trainer.ranks)
    optimizer, items = other.engine.optimizer, make_items(encoder, "t", 1)

    def state() -> tuple[torch.Tensor, torch.Tensor]:
        groups = (optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat)
        masters, weights = (torch.cat([group.detach().flatten() for group in some]).clone() for some in groups)
        return masters, weights

    states, losses = [state()], []
    for _ in range(8):
        losses.append(other.update(items)["loss"])
        states.append(state())
    with infinite_gradient(other):
        skipped = _refusal(lambda: other.update(items))
    return {"states": [states[0], states[1], states[8], state()], "losses": losses, "skipped": skipped}


def resumed(trainer: Trainer, encoder: Encoder, out: Path) -> dict[str, Any]:
    """Record the errors of broken checkpoints; then load the whole one and make its two remaining updates, each after
    two skipped ones.
    """
    checkpoints = Checkpoints(out / "checkpoints", keep=2)
    path = checkpoints.latest()
    assert path is not None
    errors = [_refusal(lambda p=p: load(trainer, p)) for p in sorted((out / "broken").iterdir())]
    state = load(trainer, path)
    stats, skipped = [], []
    for k, kinds in enumerate(BATCHES[2:], start=2):
        skipped.append(_refusal(lambda: trainer.update(infinite(make_items(encoder, "Ti", 3)))))
        with infinite_gradient(trainer):
            skipped.append(_refusal(lambda: trainer.update(make_items(encoder, "Ti", 4))))
        stats.append(trainer.update(make_items(encoder, kinds, k)))
    for step in (3, 4):
        checkpoints.save(trainer, step, {})
    kept = sorted(p.name for p in checkpoints.folder.iterdir())
    best = Checkpoints(out / "best", keep=1, best=2)
    for step, score in enumerate((0.2, None, 0.7, 0.5, 0.1, 0.6)):
        best.save(trainer, step, {}, score)
    after = trainer.logprobs(make_items(encoder, "TiI", 7))
    return {
        "stats": stats,
        "state": state,
        "errors": errors,
        "kept": kept,
        "best": sorted(p.name for p in best.folder.iterdir()),
        "after": after,
        "skipped": skipped,
    }


def resized(trainer: Trainer, encoder: Encoder, out: Path) -> dict[str, Any]:
    """Make one more update from the newest checkpoint, from any number of ranks, and save a checkpoint of it."""
    checkpoints = Checkpoints(out / "checkpoints", keep=9)
    path = checkpoints.latest()
    assert path is not None
    state = load(trainer, path)
    done = int(path.name.removeprefix("step-"))
    stats = trainer.update(make_items(encoder, BATCHES[done], done))
    checkpoints.save(trainer, done + 1, state)
    decay = [group["weight_decay"] for group in trainer.engine.optimizer.param_groups]
    left = sorted(p.name for p in checkpoints.folder.iterdir())
    return {
        "stats": stats,
        "state": state,
        "decay": decay,
        "left": left,
        "after": trainer.logprobs(make_items(encoder, "TiI", 7)),
    }


def guarded(trainer: Trainer, encoder: Encoder, out: Path) -> dict[str, Any]:
    """Run steps with an infinite advantage, a weight that is NaN, and finite ones, with the updater that skips, until
    it stops.
    """
    updater = SkippingUpdater(RunFolder(out), trainer)
    whole = make_items(encoder, "Ti", 3)
    made = [len(updater.update(0, [whole, whole])), len(updater.update(1, [whole, infinite(whole), infinite(whole)]))]
    logprobs = trainer.logprobs(whole)
    again = SkippingUpdater(RunFolder(out), trainer)
    again.restore(updater.state())
    spoil(trainer)
    made.append(len(again.update(2, [make_items(encoder, "tI", 5)])))
    stopped = _refusal(lambda: again.update(3, [whole]))
    return {
        "made": made,
        "state": again.state(),
        "stopped": stopped,
        "tokens": [item.tokens for item in whole],
        "logprobs": logprobs,
    }


def full(trainer: Trainer, encoder: Encoder, out: Path) -> dict[str, Any]:
    """Save a checkpoint; then one that the free space of the disk refuses, and one for which the disk fills while rank
    1 writes.
    """
    checkpoints = Checkpoints(out / "checkpoints", keep=2)
    trainer.update(make_items(encoder, "t", 1))
    checkpoints.save(trainer, 1, {})
    size = sum(file.stat().st_size for file in (out / "checkpoints").rglob("*.pt"))
    real, shutil.disk_usage = shutil.disk_usage, lambda path: SimpleNamespace(free=10_000)  # type: ignore[assignment]
    told = _refusal(lambda: checkpoints.save(trainer, 2, {}))
    shutil.disk_usage = real
    left = sorted(p.name for p in checkpoints.folder.iterdir())
    torch.save({"size": size, "told": told, "left": left}, out / f"full-{trainer.ranks.rank}.pt")
    if trainer.ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    checkpoints.save(trainer, 3, {})
    return {}


def hanging(trainer: Trainer, encoder: Encoder, out: Path) -> dict[str, Any]:
    """Hang rank 1 in the second micro-batch of an update."""
    watchdog = Watchdog(trainer.ranks.rank, 20, out / f"rank{trainer.ranks.rank}.pulse")
    items = make_items(encoder, "TitIIt", 0)
    trainer.update(items)
    if trainer.ranks.rank == 1:
        calls = count()
        trainer.student.register_forward_pre_hook(lambda *_: fall_asleep() if next(calls) == 1 else None)
    trainer.student.register_forward_pre_hook(lambda *_: watchdog.beat())
    with watchdog:
        watchdog.beat("step 7, update")
        trainer.update(items)
    return {}


def fall_asleep() -> None:
    time.sleep(600)


JOBS: dict[str, Callable[[Trainer, Encoder, Path], dict[str, Any]]] = {
    "straight": straight,
    "resumed": resumed,
    "resized": resized,
    "guarded": guarded,
    "full": full,
    "hanging": hanging,
}


ENDS = {"full", "hanging"}  # end with an error, on purpose


def infinite(items: list[Item]) -> list[Item]:
    """Return the items with one advantage that is not finite."""
    advantage = items[0].advantage.clone()
    advantage[1] = torch.inf
    return [replace(items[0], advantage=advantage), *items[1:]]


@contextmanager
def infinite_gradient(trainer: Trainer) -> Iterator[None]:
    """Keep the loss finite, and make its gradient infinite."""

    def spoil(module: Any, args: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradient * torch.inf)

    hook = trainer.student.model.language_model.norm.register_forward_hook(spoil)
    yield
    hook.remove()


def spoil(trainer: Trainer) -> None:
    """Set one element of one parameter to NaN."""
    import deepspeed  # takes seconds, and tests that only need the items import this module, too

    weight = trainer.student.model.language_model.layers[0].mlp.down_proj.weight
    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        if trainer.ranks.rank == 0:
            weight.data[0, 0] = torch.nan


def _refusal(act: Callable[[], object]) -> str:
    try:
        act()
    except (UserError, NotFiniteError) as error:
        return str(error)
    return ""


def launch(model: Path, out: Path, job: str, size: int) -> dict[str, Any]:
    """Run a job on `size` ranks. Returns what rank 0 found, or how all ranks ended if one failed."""
    out.mkdir(parents=True, exist_ok=True)
    ranks = start_ranks("train_worker", [str(model), str(out), job], size, f"{out}/{job}-{{rank}}.log")
    try:
        codes = wait_for_exit(ranks, [out])
    finally:
        for rank in ranks:
            rank.kill()
    if job in ENDS:
        return {"codes": codes, "logs": [(out / f"{job}-{r}.log").read_text(encoding="utf-8") for r in range(size)]}
    assert codes == [0] * size, "\n".join(
        (out / f"{job}-{r}.log").read_text(encoding="utf-8")[-3000:] for r in range(size)
    )
    found: dict[str, Any] = torch.load(out / f"{job}.pt", weights_only=False)
    return found
