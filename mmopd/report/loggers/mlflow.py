"""MLflow. MLFLOW_TRACKING_URI is read by its own package, MLFLOW_EXPERIMENT_NAME names the experiment."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from mmopd.evaluate.table import Results
from mmopd.report.heatmap import TokenRow
from mmopd.report.loggers.base import Logger, config_of, flat, picture_of, project, results_rows, sample_cells


class MLflow(Logger):
    """A run of MLflow: settings are parameters, tables are artifacts."""

    def __init__(self, run: Path, id: str) -> None:
        import mlflow
        from mlflow.entities import Metric, Param

        super().__init__(run, id)
        self._client = mlflow.MlflowClient()
        self._metric = Metric
        if self.id:
            self._client.update_run(self.id, status="RUNNING")
        else:
            name = project("MLFLOW_EXPERIMENT_NAME")
            experiment = self._client.get_experiment_by_name(name)
            of = experiment.experiment_id if experiment else self._client.create_experiment(name)
            self.id = self._client.create_run(of, run_name=run.resolve().name).info.run_id
            # MLflow refuses to change a parameter, so these are the settings at the start of the run.
            params = [Param(key, str(value)[:500]) for key, value in flat(config_of(run)).items() if str(value)]
            for i in range(0, len(params), 100):  # as many as MLflow takes at once
                self._client.log_batch(self.id, params=params[i : i + 100])
        self._client.log_dict(self.id, config_of(run), "recipe.yaml")

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Send the metrics."""
        now = int(time.time() * 1000)
        self._client.log_batch(
            self.id, metrics=[self._metric(name, value, now, step) for name, value in values.items()]
        )

    def samples(self, step: int, rows: Sequence[TokenRow]) -> None:
        """Add the rows to a table, with the pictures in its first column."""
        import pandas

        none = Image.new("RGB", (1, 1), "white")  # MLflow wants an image in all cells of a column, or in none
        lines = [{"image": picture_of(row) or none, **sample_cells(row)} for row in rows]
        self._client.log_table(self.id, pandas.DataFrame(lines), "samples.json")

    def results(self, step: int, results: Results) -> None:
        """Send the table, and its Markdown."""
        columns, rows = results_rows(results)
        self._client.log_dict(self.id, {"columns": columns, "data": rows}, "results.json")
        self._client.log_text(self.id, results.markdown(), "results.md")

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self.id)
