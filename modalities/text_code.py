"""Competition problems solved by a Python program, which unit tests judge in a sandbox (code of Eurus-2-RL-Data)."""

from mmopd.task import Task, code
from mmopd.task.base import user_turn

INSTRUCTION = (
    "Solve it in Python 3, with the standard library alone. Reason step by step, and end with the whole program in one "
    "```python block: it reads standard input and writes standard output, or defines the function that is asked for."
)

task = Task(
    name="text_code",
    modality="text",
    verify=code.verifier(),
    timeout=code.TIMEOUT,
    messages=lambda question, images: user_turn(f"{question}\n{INSTRUCTION}", images),
)
