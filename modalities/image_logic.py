"""Puzzles with figures, answered by an option's letter, a word or a number (AlgoPuzzleVQA, PuzzleVQA and the like)."""

from mmopd.task import Task, verify
from mmopd.task.base import user_turn

INSTRUCTION = (
    "Reason step by step, and put the final answer, or the letter of the right option if there are options, "
    "inside \\boxed{}."
)

task = Task(
    name="image_logic",
    modality="image",
    verify=verify.puzzle,
    messages=lambda question, images: user_turn(f"{question}\n{INSTRUCTION}", images),
)
