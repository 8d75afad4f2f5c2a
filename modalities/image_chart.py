"""Questions on charts, answered by a number, which may be 5 % off, or by a few words (ChartQA)."""

from mmopd.task import Task, documents
from mmopd.task.base import user_turn

INSTRUCTION = "Reason step by step, and put the final answer, a number or a few words, inside \\boxed{}."

task = Task(
    name="image_chart",
    modality="image",
    verify=documents.relaxed_number,
    messages=lambda question, images: user_turn(f"{question}\n{INSTRUCTION}", images),
)
