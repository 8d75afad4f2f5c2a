"""Functions of ocrbench.yaml: lmms-eval's own, and the score of one answer."""

from typing import Any

from lmms_eval.tasks.ocrbench.utils import ocrbench_doc_to_text, ocrbench_doc_to_visual, ocrbench_process_results

__all__ = ["ocrbench_doc_to_text", "ocrbench_doc_to_visual", "score"]


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return 1 if the answer contains one of the keys, otherwise 0."""
    return {"accuracy": float(ocrbench_process_results(doc, results)["ocrbench_accuracy"]["score"])}
