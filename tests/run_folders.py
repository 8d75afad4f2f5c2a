"""A run folder as a run leaves it, for tests of the report."""

import base64
import io
import json
from contextlib import closing
from pathlib import Path

from PIL import Image

from mmopd import settings_file
from mmopd.config import Recipe, Student
from mmopd.evaluate import BenchmarkScore, Results, Row
from mmopd.report.heatmap import TokenRow, as_json
from mmopd.report.metrics import JsonLines, MetricsWriter
from mmopd.teacher import identity
from mmopd.teacher.identity import Change, Record


def png(width: int, height: int) -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "white").save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def row(step: int = 0, task: str = "digit_sum", outcome: float | None = 1.0, **more: object) -> TokenRow:
    values: dict[str, object] = {
        "step": step,
        "task": task,
        "modality": "image",
        "prompt": "What is their sum?",
        "images": [png(64, 32)],
        "tokens": ["3", "+", "5", "=", "8"],
        "student": [-0.1, -0.2, -0.3, -0.4, -0.5],
        "teacher": [-0.2, -0.2, -0.3, -6.4, -0.1],
        "advantage": [0.1, 0.2, 0.2, -5.8, 0.6],
        "outcome": outcome,
        "teacher_name": "image_teacher",
        "kept": True,
    }
    return TokenRow(**(values | more))  # type: ignore[arg-type]


def record_of(model: str, score: float | None) -> BenchmarkScore:
    status, reason = ("ok", "") if score is not None else ("failed", "3 of 8 requests failed")
    return BenchmarkScore(model, "student", "Digits", "t", "m", status, reason, score, 1.0, 8, "w", "d", {}, {}, 1.0)  # type: ignore[arg-type]


def write_run(run: Path) -> Path:
    """Write a small but complete run folder."""
    (run / "difficulty").mkdir(parents=True)
    recipe = Recipe(
        student=Student(model=Path("models/base")), fleet=Path("teachers/f.yaml"), mixture=Path("data/m.yaml")
    )
    (run / "recipe.yaml").write_text(settings_file.dump(recipe), encoding="utf-8")
    (run / "versions.json").write_text(json.dumps({"mmopd": "1.2.3", "torch": "9.9"}), encoding="utf-8")
    (run / "stages.json").write_text(json.dumps({"serve": 30.0, "distil": 170.0}), encoding="utf-8")
    change = Change("image_teacher", 12, "2026-01-01", ("weights (a before, b now)",), None)
    identity.save(run / "teachers.json", Record({}, (change,)))
    source = {"correct": [0, 2, 2, 1], "attempts": [2, 2, 2, 2], "shape": "flat", "weights": [1.0, 1.0, 1.0, 2.0]}
    (run / "difficulty" / "difficulty.json").write_text(
        json.dumps({"version": 2, "sources": {"digits": source}}), encoding="utf-8"
    )
    with closing(MetricsWriter(run / "metrics.jsonl", 0)) as writer:
        for step in range(20):
            writer.write(
                step,
                {
                    "return": -0.2 + step / 100,
                    "accuracy/digit_sum": 0.4,
                    "absent": 0,
                    "share/kept": 0.5,
                    "seconds/rollout": 1.5,
                },
            )

    rows = [
        Row("base", "base", (record_of("base", 40.0),)),
        Row("t", "teacher", (record_of("t", 90.0),)),
        Row("distilled", "distilled", (record_of("distilled", 70.0),)),
    ]
    Results.of([*rows, Row("other", "teacher", (record_of("other", None),))]).write(run)
    samples = JsonLines(run / "samples.jsonl", 0)
    samples.append(as_json(row(prompt="is 1 < 2 & </script><b>?", tokens=["</script>", "<img src=x>", "5", "=", "8"])))
    samples.append(as_json(row(step=19, visual=[0.0, -0.5, 3.5, 1.25, 0.5])))
    samples.close()
    return run
