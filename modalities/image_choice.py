"""Questions on images with lettered options (PuzzleVQA, AI2D and the like); the key is the letter."""

from mmopd.task import Task, verify
from mmopd.task.base import user_turn

INSTRUCTION = "Reason step by step, and put the letter of the right option inside \\boxed{}."

task = Task(
    name="image_choice",
    modality="image",
    verify=verify.choice,
    messages=lambda question, images: user_turn(f"{question}\n{INSTRUCTION}", images),
)
