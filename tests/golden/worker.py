"""Train the demo's student on recorded responses: `python worker.py MODEL RESPONSES OUT full|quick`.

There is one process per rank.
RANK, WORLD_SIZE etc. are in the environment. Each case trains a student of its own from the same weights, through the
product's path: `build_batch`, `minibatches`, `Trainer.update`. Rank 0 builds MODEL if it does not exist, and writes OUT
as JSON: the machine, and for each case the loss and the gradient norm of every update, and a checksum of the weights
before the first and after every tenth.

`full` makes 40 updates in every case, `quick` the first 10 of them in half of the cases: a test has to be short.
"""

import base64
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

# All that is taken from mmopd: a change that moves a module adapts these lines, and `pad` below.
from mmopd.algorithm.settings import Algorithm
from mmopd.config import Train
from mmopd.demo.world import build_student
from mmopd.modality import Encoder
from mmopd.records import Absent, Encoded, Outcome, Prompt, Response, Sample, Score
from mmopd.train.batch import build_batch, minibatches
from mmopd.train.distributed import Ranks, start, stop
from mmopd.train.prefix_tree import Item
from mmopd.train.trainer import Trainer

UPDATES = {"full": 40, "quick": 10}
CHECKSUM_EVERY = 10
TRAIN: dict[str, Any] = {
    "steps": 20,
    "minibatches": 2,
    "dtype": "float32",
    "lr": 1e-3,
    "warmup": 2,
    "schedule": "cosine",
    "micro_tokens": 400,  # one micro-batch an update
    "gradient_checkpointing": False,
}
PLAIN = {"balance": None, "margin": None, "visual": None}
OBJECTIVES: dict[str, dict[str, Any]] = {  # settings of `Algorithm`
    "opd": PLAIN,
    "uni-opd-shift": {},
    "uni-opd-mask": {"margin": {"kind": "mask"}, "visual": {"token_weight": 0.5}},
    "exopd": PLAIN | {"objective": {"kind": "exopd", "reference": "start"}},
    "grpo": {"objective": {"kind": "grpo"}},
    "sft": {"objective": {"kind": "sft"}},
    "dense": {"objective": {"kind": "dense", "top_k": 3}},
}


@dataclass(frozen=True)
class Case:
    """One training run."""

    objective: str
    padded: bool = False  # one sample a row and several micro-batches an update; else packed rows and one micro-batch
    lora: bool = False

    def name(self, ranks: int) -> str:
        """Return its key in the results: `opd/1/packed`, `uni-opd-shift/2/packed-lora`."""
        return f"{self.objective}/{ranks}/{'padded' if self.padded else 'packed'}{'-lora' * self.lora}"

    @property
    def train(self) -> dict[str, Any]:
        """Return the settings of `Train` that differ from `TRAIN`."""
        return ({"micro_tokens": 100} if self.padded else {}) | ({"lora": {"rank": 4}} if self.lora else {})


CASES = [
    *(Case(objective) for objective in OBJECTIVES),
    *(Case(objective, padded=True) for objective in ("opd", "uni-opd-shift", "dense")),
    Case("uni-opd-shift", lora=True),
]
QUICK = {  # by number of ranks
    1: [*(Case(objective) for objective in OBJECTIVES), Case("opd", padded=True), Case("uni-opd-shift", lora=True)],
    2: [Case("uni-opd-shift"), Case("dense", padded=True)],
}


def pad(trainer: Trainer) -> None:
    """Make a trainer lay out one sample a row, as it does for models whose layers keep a state along a row."""
    trainer._collate.layout = "alone"


def main(model: Path, responses: Path, out: Path, size: str) -> None:
    torch.set_num_threads(1)
    ranks = start(120)
    if ranks.rank == 0 and not model.exists():
        build_student(model)
    ranks.barrier()
    encoder, recorded = Encoder(model), json.loads(responses.read_text(encoding="utf-8"))
    chosen = QUICK[ranks.size] if size == "quick" else CASES
    cases = {
        case.name(ranks.size): train(trainer_of(case, model, encoder, ranks), recorded, UPDATES[size])
        for case in chosen
    }
    if ranks.rank == 0:
        out.write_text(json.dumps({"machine": machine(), "cases": cases}), encoding="utf-8")
    ranks.barrier()
    stop()


def trainer_of(case: Case, model: Path, encoder: Encoder, ranks: Ranks) -> Trainer:
    settings = Train.model_validate(TRAIN | case.train)
    trainer = Trainer(model, encoder, settings, Algorithm.model_validate(OBJECTIVES[case.objective]), ranks)
    if case.padded:
        pad(trainer)
    return trainer


def train(trainer: Trainer, recorded: Mapping[str, Any], n: int) -> dict[str, list[Any]]:
    """Make `n` updates. Returns losses and gradient norms by update, and checksums of the weights."""
    losses: list[float] = []
    norms: list[float] = []
    weights = [checksum(trainer)]
    for items in islice(updates(recorded, trainer.algorithm, trainer.settings.minibatches), n):
        found = trainer.update(items)
        losses.append(found["loss"])
        norms.append(found["grad_norm"])
        if len(losses) % CHECKSUM_EVERY == 0:
            weights.append(checksum(trainer))
    return {"loss": losses, "grad_norm": norms, "weights": weights}


def updates(recorded: Mapping[str, Any], algorithm: Algorithm, n: int) -> Iterator[list[Item]]:
    """Yield the items of each update. The recorded steps are repeated without end, with other draws of the balance."""
    pool = [read_prompt(prompt) for prompt in recorded["prompts"]]
    for step in count():
        rows = recorded["steps"][step % len(recorded["steps"])]
        numbers = list(dict.fromkeys(row["prompt"] for row in rows))
        samples = [
            read_sample(row, numbers.index(row["prompt"]), dense=algorithm.objective.likeliest() > 0) for row in rows
        ]
        yield from minibatches(build_batch(samples, algorithm, seed=step), [pool[number] for number in numbers], n)


def read_prompt(row: Mapping[str, Any]) -> Encoded:
    """Read a prompt with its recorded ids, so that the tokenizer has no part in the losses."""
    image = (base64.b64decode(row["image"]),) if row["image"] else ()
    prompt = Prompt(row["key"], "golden", "image" if image else "text", (), image, "")
    return Encoded(prompt, tuple(row["ids"]), tuple(row["expanded"]), tuple(tuple(grid) for grid in row["grids"]))


def read_sample(row: Mapping[str, Any], group: int, *, dense: bool) -> Sample:
    """Read a response with its scores, and with the teacher's likeliest tokens where the objective asks for them."""
    tokens, weight = tuple(row["tokens"]), row["weight"]
    response = Response(tokens, tuple(row["student"]), "", "stop", (("step-0", len(tokens)),))
    outcome = Outcome(math.nan if row["outcome"] is None else row["outcome"])
    if row["teacher"] is None:
        return Sample(group, response, outcome, Absent("teacher", "timeout"))
    score = Score("teacher", tuple(row["teacher"]), weight)
    if dense:
        score = replace(score, top=tuple(dict(at) for at in row["likeliest"]))
    blind = Score("teacher", tuple(row["blind"])) if row["blind"] else None
    return Sample(group, response, outcome, score, blind, Score("start", tuple(row["reference"])))


def checksum(trainer: Trainer) -> str:
    """Return the SHA-256 of all weights as a checkpoint has them; "" except on rank 0. Collective."""
    digest = hashlib.sha256()
    for name, weight in trainer.named_weights():
        digest.update(name.encode())
        digest.update(weight.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest() if trainer.ranks.rank == 0 else ""


def machine() -> dict[str, str]:
    """Name what the last bits of a loss depend on: the CPU, its instructions in use, the versions of libraries."""
    fields = ("vendor_id", "cpu family", "model", "model name", "stepping")
    lines = (
        line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    )
    cpu = {name.strip(): value.strip() for name, _, value in lines}
    libraries = ("torch", "transformers", "deepspeed", "numpy")
    return {
        "cpu": ", ".join(cpu.get(field, "") for field in fields),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        **{library: version(library) for library in libraries},
    }


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4])
