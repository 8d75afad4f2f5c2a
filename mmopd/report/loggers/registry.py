"""The loggers by the names that a recipe may list: each is a file here, a line here, and an extra of pyproject.toml."""

from collections.abc import Mapping

from mmopd.report.loggers.base import Logger
from mmopd.report.loggers.mlflow import MLflow
from mmopd.report.loggers.tensorboard import TensorBoard
from mmopd.report.loggers.trackio import Trackio
from mmopd.report.loggers.wandb import WandB

# The names are also those of the packages, which the classes import.
LOGGERS: Mapping[str, type[Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "trackio": Trackio,
    "mlflow": MLflow,
}
