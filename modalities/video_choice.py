"""Questions on clips with lettered options (what moves where, what comes first, how often); the key is the letter."""

from mmopd.task import Task, verify
from mmopd.task.base import user_turn

INSTRUCTION = "Reason step by step, and put the letter of the right option inside \\boxed{}."

task = Task(
    name="video_choice",
    modality="video",
    verify=verify.choice,
    messages=lambda question, clips: user_turn(f"{question}\n{INSTRUCTION}", clips, "video"),
)
