"""Records of the offline difficulty pass (paper 3.3, A.1): counts, weights and the figure. No model runs here.

The counts of a source are kept next to its shards, in `difficulty/NAME.jsonl`. NAME stands for the student and the way
it was sampled, so all mixtures, policies and runs share the counts. The file grows while the student answers, and a
stopped pass continues from it. A run's `difficulty.json` (counts, shape and weights for each row of each source) and
the histograms before and after weighting (Fig. 3) are computed from the counts. Each file states what it is made from,
and is refused for anything else.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from mmopd.algorithm import difficulty_shape, difficulty_weights, drop_easy_weights, frontier_weights
from mmopd.algorithm.settings import Difficulty
from mmopd.errors import ConfigError, DataError
from mmopd.prompts.ledger import VERSION, Ledger, Origin, check_version, ledger_file
from mmopd.prompts.measured import Measured
from mmopd.prompts.shards import Shards

FILE = "difficulty.json"
PICTURE = "difficulty.png"


def origin(shards: Shards, student: str, settings: Difficulty, *, max_tokens: int, threshold: float) -> dict[str, Any]:
    """Return the inputs of a source's counts, without the settings that only use them (policy, shape, cap).

    Args:
        student: hash of the model's files.
        max_tokens: response limit.
        threshold: smallest outcome that counts as right.
    """
    sampling = settings.model_dump(mode="json", include={"attempts", "temperature", "top_p", "top_k"})
    return {
        "data": shards.fingerprint,
        "student": student,
        "sampling": sampling | {"max_tokens": max_tokens},
        "threshold": threshold,
    }


def counts_file(shards: Shards, made_from: Origin) -> Path:
    """Return the path at which the counts of a source are kept."""
    return ledger_file(shards, "difficulty", made_from)


class Counts(Ledger):
    """Counts of each row of a source: (right answers, judged answers)."""

    what = "the counts of the difficulty pass"

    def of(self, rows: int) -> tuple[list[int], list[int]]:
        """Return (correct, attempts) of the rows 0 to `rows` - 1.

        Raises:
            KeyError: a row has not been counted.
        """
        pairs = [self[row] for row in range(rows)]
        return [c for c, _ in pairs], [a for _, a in pairs]


def measure(counts: Counts, rows: int, settings: Difficulty) -> Measured:
    """Compute shape and weights of a source of `rows` rows from complete counts.

    Raises:
        KeyError: a row has not been counted.
        ConfigError: the policy leaves no row.
    """
    correct, attempts = counts.of(rows)
    c = torch.tensor(correct)
    k = torch.tensor(attempts)
    shape = difficulty_shape(c, k) if settings.shape == "auto" else settings.shape
    if settings.policy == "flatten":
        weights = difficulty_weights(c, k, shape=shape, cap=settings.cap)
    else:
        weights = {"drop_easy": drop_easy_weights, "frontier": frontier_weights}[settings.policy](c, k)
    if not weights.any():
        raise ConfigError(
            f"algorithm.difficulty.policy: {settings.policy} leaves no prompt of a source, because all are {shape}; "
            "choose flatten"
        )
    return Measured(tuple(correct), tuple(attempts), shape, tuple(weights.tolist()))


def save(path: Path, measured: Mapping[str, Measured], fingerprints: Mapping[str, str]) -> None:
    """Write `difficulty.json`, whole or not at all."""
    sources = {name: {"fingerprint": fingerprints[name], **asdict(one)} for name, one in measured.items()}
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"version": VERSION, "sources": sources}), encoding="utf-8")
    unfinished.replace(path)


def load(path: Path) -> dict[str, Measured]:
    """Read `difficulty.json`.

    Raises:
        DataError: the file is missing, or is not a `difficulty.json`.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        check_version(data)
        return {
            name: Measured(tuple(one["correct"]), tuple(one["attempts"]), one["shape"], tuple(one["weights"]))
            for name, one in data["sources"].items()
        }
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run the difficulty pass first") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: not the result of a difficulty pass ({error}); delete it to measure again") from None


def histogram(measured: Measured) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return (before, after) [K + 1]: rows by number of right answers 0..K, and their draws in one epoch.

    The epoch is as long as the source. A row with fewer judged answers than K is counted in the bin nearest to its
    share of right answers; the first and the last bin hold only rows that are never or always right. A row without
    judged answers is left out.
    """
    correct = np.array(measured.correct)
    attempts = np.array(measured.attempts)
    weights = np.array(measured.weights)
    known = attempts > 0
    K = int(attempts.max())
    bins = np.rint(correct[known] / attempts[known] * K).astype(int)
    mixed = (correct[known] > 0) & (correct[known] < attempts[known])
    bins = np.where(mixed, bins.clip(1, max(1, K - 1)), bins)
    before = np.bincount(bins, minlength=K + 1).astype(np.float64)
    after = np.bincount(bins, weights[known] / weights.mean(), minlength=K + 1)
    return before, after.astype(np.float64)


def table(measured: Mapping[str, Measured]) -> Table:
    """Return a table of the results, one line for each source."""
    shown = Table(title="Right answers of the untrained student", title_justify="left")
    for column in ("source", "rows", "never right", "sometimes", "always", "not judged", "shape", "weights"):
        shown.add_column(column, justify="left" if column in {"source", "shape"} else "right")
    for name, one in measured.items():
        correct = np.array(one.correct)
        attempts = np.array(one.attempts)
        known = attempts > 0
        never = int((known & (correct == 0)).sum())
        always = int((known & (correct == attempts)).sum())
        counts = [len(known), never, int(known.sum()) - never - always, always, int((~known).sum())]
        weights = f"{min(one.weights):.2f} to {max(one.weights):.2f}"
        shown.add_row(escape(name), *(f"{n:,}" for n in counts), one.shape.replace("_", " "), weights)
    return shown


def draw(path: Path, measured: Mapping[str, Measured]) -> None:
    """Draw the histograms of each source before and after weighting, as a PNG (Fig. 3)."""
    from matplotlib.figure import Figure  # half a second, and ranks draw nothing

    shown = {name: one for name, one in measured.items() if any(one.attempts)}
    figure = Figure(figsize=(6.4, 0.6 + 2.4 * max(1, len(shown))), layout="constrained")
    if not shown:
        figure.text(0.5, 0.5, "no answer could be judged", ha="center")
    for axes, (name, one) in zip(
        figure.subplots(max(1, len(shown)), squeeze=False)[:, 0] if shown else (), shown.items(), strict=True
    ):
        before, after = histogram(one)
        x = np.arange(len(before))
        axes.bar(x - 0.2, before, 0.4, color="#b8c4d0", label="before: rows")
        axes.bar(x + 0.2, after, 0.4, color="#2f6f9f", label="after: draws in an epoch as long")
        axes.set_title(f"{name} ({one.shape.replace('_', ' ')}, {len(one.correct):,} rows)", fontsize=10, loc="left")
        axes.set_xticks(x)
        axes.set_xlabel(f"right answers of {len(before) - 1}", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.15)
    if shown:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
