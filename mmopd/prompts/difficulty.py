"""Bookkeeping of the offline difficulty pass (paper 3.3, A.1): counts, weights, the picture; no model runs here.

`counts.jsonl` grows while the untrained student answers, and is where a stopped pass goes on. From it come
`difficulty.json` (counts, shape and weights for each row of each source) and the histograms before and after (Fig. 3).
Both files say what they are made from, and are refused for anything else.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TextIO

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from mmopd import config
from mmopd.algorithm import difficulty_shape, difficulty_weights
from mmopd.errors import UserError
from mmopd.fingerprint import hash_model
from mmopd.prompts.shards import Shards

VERSION = 1
FILE, PICTURE = "difficulty.json", "difficulty.png"
Origin = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Measured:
    """What the pass found of one source of P rows."""

    correct: tuple[int, ...]  # [P] right answers
    attempts: tuple[int, ...]  # [P] answers that the verifier could judge
    shape: str  # of the histogram of correct / attempts
    weights: tuple[float, ...]  # [P] for `Rows.weights`


def origin(sources: Mapping[str, Shards], student: Path, settings: config.Difficulty, **more: Any) -> dict[str, Any]:
    """What a pass is made from: the sources' content, the student's files, the settings, and what else matters (seed, limits)."""
    return {
        "sources": {name: shards.fingerprint for name, shards in sorted(sources.items())},
        "student": hash_model(student),
        "settings": settings.model_dump(mode="json"),
        **more,
    }


class Counts:
    """Counts of each prompt by its key, kept in a file that only grows: what was counted before is there when it is opened.

    Raises:
        UserError: the file was made from something else, or is not such a file.
    """

    def __init__(self, path: Path, made_from: Origin) -> None:
        self._found: dict[str, tuple[int, int]] = {}
        if path.exists():
            whole = self._load(path, made_from)
            self._file: TextIO = path.open("r+")
            self._file.truncate(whole)  # a line that a kill cut short
            self._file.seek(whole)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w")
            self._append({"version": VERSION, "made_from": made_from})

    def add(self, key: str, correct: int, attempts: int) -> None:
        """Count a prompt: `correct` of `attempts` judged answers were right."""
        self._found[key] = correct, attempts
        self._append([key, correct, attempts])

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __len__(self) -> int:
        return len(self._found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def of(self, shards: Shards) -> tuple[list[int], list[int]]:
        """(correct, attempts) of every row of a source.

        Raises:
            KeyError: a row has not been counted.
        """
        pairs = [self._found[f"{shards.name}/{row}"] for row in range(len(shards))]
        return [c for c, _ in pairs], [a for _, a in pairs]

    def _append(self, line: object) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def _load(self, path: Path, made_from: Origin) -> int:
        """Read the complete lines; returns their length in bytes."""
        whole, newline, _ = path.read_bytes().rpartition(b"\n")
        try:
            head, *lines = map(json.loads, whole.splitlines())
            _check(path, head, made_from)
            self._found = {key: (correct, attempts) for key, correct, attempts in lines}
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: not the counts of a difficulty pass ({error}); delete it to measure again") from None
        return len(whole) + len(newline)


def measure(counts: Counts, sources: Mapping[str, Shards], settings: config.Difficulty) -> dict[str, Measured]:
    """Shape and weights of each source from complete counts."""
    measured = {}
    for name, shards in sources.items():
        correct, attempts = counts.of(shards)
        c, k = torch.tensor(correct), torch.tensor(attempts)
        shape = difficulty_shape(c, k) if settings.shape == "auto" else settings.shape
        weights = difficulty_weights(c, k, shape=shape, cap=settings.cap)
        measured[name] = Measured(tuple(correct), tuple(attempts), shape, tuple(weights.tolist()))
    return measured


def save(path: Path, measured: Mapping[str, Measured], made_from: Origin) -> None:
    """Write `difficulty.json`; it is there when it is whole."""
    sources = {name: asdict(one) for name, one in measured.items()}
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"version": VERSION, "made_from": made_from, "sources": sources}))
    unfinished.replace(path)


def load(path: Path, made_from: Origin | None = None) -> dict[str, Measured]:
    """Read `difficulty.json`, and compare what it was made from, if that is given.

    Raises:
        UserError: missing, not such a file, or made from something else.
    """
    try:
        data = json.loads(path.read_text())
        _check(path, data, made_from)
        return {
            name: Measured(tuple(one["correct"]), tuple(one["attempts"]), one["shape"], tuple(one["weights"]))
            for name, one in data["sources"].items()
        }
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; run the difficulty pass first") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not the result of a difficulty pass ({error}); delete it to measure again") from None


def histogram(measured: Measured) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(before, after) [K + 1]: rows, and draws in an epoch as long, with 0..K right answers of K.

    A row with fewer judged answers than K counts where its share of right ones is nearest; the ends are for
    never and always; one with none is left out.
    """
    correct, attempts, weights = np.array(measured.correct), np.array(measured.attempts), np.array(measured.weights)
    known = attempts > 0
    K = int(attempts.max())
    bins = np.rint(correct[known] / attempts[known] * K).astype(int)
    mixed = (correct[known] > 0) & (correct[known] < attempts[known])
    bins = np.where(mixed, bins.clip(1, max(1, K - 1)), bins)
    before = np.bincount(bins, minlength=K + 1).astype(np.float64)
    after = np.bincount(bins, weights[known] / weights.mean(), minlength=K + 1)
    return before, after.astype(np.float64)


def draw(path: Path, measured: Mapping[str, Measured]) -> None:
    """The histograms of each source before and after as a PNG (Fig. 3)."""
    shown = {name: one for name, one in measured.items() if any(one.attempts)}
    figure = Figure(figsize=(6.4, 0.6 + 2.4 * max(1, len(shown))), layout="constrained")
    if not shown:
        figure.text(0.5, 0.5, "no answer could be judged", ha="center")
    for axes, (name, one) in zip(figure.subplots(max(1, len(shown)), squeeze=False)[:, 0] if shown else (), shown.items(), strict=True):
        before, after = histogram(one)
        x = np.arange(len(before))
        axes.bar(x - 0.2, before, 0.4, color="#b8c4d0", label="before: rows")
        axes.bar(x + 0.2, after, 0.4, color="#2f6f9f", label="after: draws in an epoch as long")
        axes.set_title(f"{name} ({one.shape}, {len(one.correct):,} rows)", fontsize=10, loc="left")
        axes.set_xticks(x)
        axes.set_xlabel(f"right answers of {len(before) - 1}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.15)
    if shown:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)


def _check(path: Path, data: Mapping[str, Any], made_from: Origin | None) -> None:
    if data["version"] != VERSION:
        raise ValueError(f"version {data['version']}, and this is made for {VERSION}")
    if made_from is None:
        return
    was, now = data["made_from"], json.loads(json.dumps(made_from))
    if changed := sorted(key for key in {*was, *now} if was.get(key) != now.get(key)):
        raise UserError(f"{path}: made from another {', another '.join(changed)}; delete it to measure again")
