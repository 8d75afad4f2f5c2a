"""Tasks and the verifiers that judge their answers."""

from mmopd.task import code, documents, verify
from mmopd.task.base import Task
from mmopd.task.load import load_tasks
from mmopd.task.verify import RIGHT, WRONG

__all__ = ["RIGHT", "WRONG", "Task", "code", "documents", "load_tasks", "verify"]
