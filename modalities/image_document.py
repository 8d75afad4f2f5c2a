"""Questions on scanned pages and infographics, answered in words of the page (DocVQA, InfographicVQA); uses ANLS."""

from mmopd.task import Task, documents
from mmopd.task.base import user_turn

INSTRUCTION = "Put the answer, in as few words of the document as possible, inside \\boxed{}."

task = Task(
    name="image_document",
    modality="image",
    verify=documents.anls,
    messages=lambda question, images: user_turn(f"{question}\n{INSTRUCTION}", images),
)
