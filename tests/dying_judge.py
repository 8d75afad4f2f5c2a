"""Tasks whose verifier dies, hangs or works, as a response says."""

import os
import time

from mmopd.records import Outcome
from mmopd.task.base import Task


def verify(response: str, answer: str) -> Outcome:
    if response == "die":
        os._exit(3)
    if response == "hang":
        time.sleep(60)
    return Outcome(float(response == answer))


TASKS = {"math_verify": Task("math_verify", "text", verify)}
