"""TensorBoard: event files in RUN/tensorboard."""

import html
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmopd.evaluate.table import Results
from mmopd.report.heatmap import TokenRow
from mmopd.report.loggers.base import Logger, config_of, flat, picture_of, sample_cells


class TensorBoard(Logger):
    """Writes a new event file for each part of a run, which holds the run from its first step.

    torch has a writer, too; this one needs no torch in the process.
    """

    keeps = False

    def __init__(self, run: Path, id: str) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2
        from tensorboard.plugins.text.metadata import create_summary_metadata
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        super().__init__(run, id)
        self._event = event_pb2.Event
        self._summary = summary_pb2.Summary
        self._tensor = tensor_pb2.TensorProto
        self._string = types_pb2.DT_STRING
        self._metadata = create_summary_metadata(display_name="", description="")
        folder = run / "tensorboard"
        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        self._file = EventFileWriter(str(folder))
        # A TensorBoard that has read the earlier file forgets it.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._file.add_event(event_pb2.Event(wall_time=time.time(), step=0, session_log=start))
        self._write_text(
            "recipe", 0, _markdown(["key", "value"], [[k, str(v)] for k, v in flat(config_of(run)).items()])
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars."""
        self._add(step, [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._file.flush()

    def samples(self, step: int, rows: Sequence[TokenRow]) -> None:
        """Write the samples as a table of text, and their pictures as images."""
        cells = [sample_cells(row) for row in rows]
        self._write_text("samples", step, _markdown(list(cells[0]), [[str(v) for v in c.values()] for c in cells]))
        for i, row in enumerate(rows):
            if (picture := picture_of(row)) is not None:
                file = io.BytesIO()
                picture.save(file, format="PNG")
                image = self._summary.Image(
                    height=picture.height, width=picture.width, colorspace=3, encoded_image_string=file.getvalue()
                )
                self._add(step, [self._summary.Value(tag=f"samples/{i} {row.task}", image=image)])

    def results(self, step: int, results: Results) -> None:
        """Write the table as text."""
        self._write_text("results", step, results.markdown())

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, step: int, values: Sequence[object]) -> None:
        self._file.add_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=values)))

    def _write_text(self, tag: str, step: int, text: str) -> None:
        tensor = self._tensor(dtype=self._string, string_val=[text.encode()], tensor_shape={"dim": [{"size": 1}]})
        self._add(step, [self._summary.Value(tag=tag, metadata=self._metadata, tensor=tensor)])


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; TensorBoard shows Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "&#124;").replace("\n", "<br>")
