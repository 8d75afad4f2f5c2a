"""trackio. Its package reads TRACKIO_DIR, TRACKIO_SPACE_ID and TRACKIO_SERVER_URL; TRACKIO_PROJECT is ours."""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from mmopd.evaluate.table import Results
from mmopd.report.heatmap import TokenRow
from mmopd.report.loggers.base import Logger, config_of, flat, picture_of, project, results_rows, sample_cells


class Trackio(Logger):
    """A run of trackio, which finds it again by its name."""

    def __init__(self, run: Path, id: str) -> None:
        import trackio

        super().__init__(run, id or f"{run.resolve().name}-{os.urandom(4).hex()}")
        self._trackio = trackio
        with _warnings_are_errors():
            self._run = trackio.init(
                project("TRACKIO_PROJECT"),
                name=self.id,
                resume="allow",
                config=flat(config_of(run)),
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Send the metrics."""
        with _warnings_are_errors():
            self._run.log(dict(values), step=step)

    def samples(self, step: int, rows: Sequence[TokenRow]) -> None:
        """Send a table, with the pictures in its first column."""
        lines = []
        for row in rows:
            picture = picture_of(row)
            lines.append({"image": self._trackio.Image(picture) if picture else "", **sample_cells(row)})
        with _warnings_are_errors():
            self._run.log({"samples": self._trackio.Table(data=lines)}, step=step)

    def results(self, step: int, results: Results) -> None:
        """Send the table."""
        columns, rows = results_rows(results)
        with _warnings_are_errors():
            self._run.log({"results": self._trackio.Table(columns=columns, data=rows)}, step=step)

    def close(self) -> None:
        """Finish this part of the run."""
        with _warnings_are_errors():
            self._run.finish()


@contextmanager
def _warnings_are_errors() -> Iterator[None]:
    """Raise what trackio only warns of after it has caught an error."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        yield
    if said:
        raise RuntimeError(str(said[0].message))
