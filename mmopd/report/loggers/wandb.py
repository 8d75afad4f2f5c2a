"""Weights & Biases. WANDB_PROJECT, WANDB_ENTITY, WANDB_API_KEY and WANDB_MODE (offline) are read by its own package."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmopd.evaluate.table import Results
from mmopd.report.heatmap import TokenRow
from mmopd.report.loggers.base import Logger, config_of, picture_of, project, results_rows, sample_cells


class WandB(Logger):
    """A run of W&B; its files are in RUN/loggers/wandb, from where `wandb sync` sends an offline run."""

    def __init__(self, run: Path, id: str) -> None:
        import wandb

        super().__init__(run, id or os.urandom(4).hex())
        self._wandb = wandb
        self._run = wandb.init(
            project=project("WANDB_PROJECT"),
            id=self.id,
            name=run.resolve().name,
            resume="allow",
            dir=run / "loggers",
            settings=wandb.Settings(console="off", save_code=False),
        )
        self._run.config.update(config_of(run), allow_val_change=True)  # type: ignore[no-untyped-call]

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Send the metrics; W&B sends a step when the next one begins."""
        self._run.log(dict(values), step=step)

    def samples(self, step: int, rows: Sequence[TokenRow]) -> None:
        """Send a table, with the pictures in its first column."""
        cells = [sample_cells(row) for row in rows]
        table = self._wandb.Table(columns=["image", *cells[0]], allow_mixed_types=True)
        for row, line in zip(rows, cells, strict=True):
            picture = picture_of(row)
            table.add_data(self._wandb.Image(picture) if picture else None, *line.values())
        self._run.log({"samples": table}, step=step)

    def results(self, step: int, results: Results) -> None:
        """Send the table."""
        columns, rows = results_rows(results)
        self._run.log({"results": self._wandb.Table(columns=columns, data=rows)}, step=step)

    def close(self) -> None:
        """Finish this part of the run."""
        self._run.finish()
