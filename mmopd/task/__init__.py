"""Tasks and the verifiers that judge their answers."""

from typing import TYPE_CHECKING

from mmopd.lazy import importer

if TYPE_CHECKING:
    from mmopd.task import code, documents, verify
    from mmopd.task.base import Task
    from mmopd.task.load import load_tasks
    from mmopd.task.verify import RIGHT, WRONG

__all__ = ["RIGHT", "WRONG", "Task", "code", "documents", "load_tasks", "verify"]

# `from mmopd.task import verify` finds the modules of verifiers itself.
__getattr__ = importer(
    __name__,
    {
        "RIGHT": "mmopd.task.verify",
        "Task": "mmopd.task.base",
        "WRONG": "mmopd.task.verify",
        "load_tasks": "mmopd.task.load",
    },
)
