"""Mathematics with figures, with an answer that can be compared as mathematics (MMK12, WeMath and the like)."""

from mmopd.task import Task, verify
from mmopd.task.base import user_turn

INSTRUCTION = "Reason step by step, and put the final answer inside \\boxed{}."

task = Task(
    name="image_math",
    modality="image",
    verify=verify.math,
    messages=lambda question, images: user_turn(f"{question}\n{INSTRUCTION}", images),
)
