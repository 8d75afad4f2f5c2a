"""The start that all calls of lmms-eval share, run once in the process from which they are forked (`calls`)."""

import contextlib
import ctypes
import gc
import os
import signal
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1

os.environ["CUDA_VISIBLE_DEVICES"] = (
    ""  # a call needs no GPU, and CUDA that is initialized before a fork cannot be used after it
)
os.environ["USE_LLM_JUDGE"] = "False"  # else a variable of the user's shell could change scores
ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
_nowhere = os.open(os.devnull, os.O_WRONLY)
os.dup2(_nowhere, 1)  # each call has its own log
os.dup2(_nowhere, 2)
with contextlib.suppress(Exception):  # an error occurs again in each call, which writes it to its log
    import lmms_eval.__main__
    from lmms_eval.api.metrics import mean, stderr_for_metric
    from lmms_eval.models import get_model
    from lmms_eval.tasks import TaskManager
    from lmms_eval.tasks._task_utils import reasoning_utils  # noqa: F401  (math-verify, the judge of many tasks)

    get_model("openai")
    stderr_for_metric(mean, 1)  # imports packages of words, whatever the metric
    _shipped = f"{Path(lmms_eval.tasks.__file__).parent}/"
    _look_into = TaskManager._get_task_and_group
    _found = _look_into(TaskManager("ERROR", include_defaults=False), _shipped)  # searches a thousand files

    def _find(manager: TaskManager, folder: str) -> Any:
        return dict(_found) if folder == _shipped else _look_into(manager, folder)

    TaskManager._get_task_and_group = _find
gc.collect()
gc.freeze()  # a collection would write to the pages that the calls share, and so copy them
