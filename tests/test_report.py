"""The report page."""

import json
import re
from pathlib import Path

import pytest
from run_folders import write_run

from mmopd import settings_file
from mmopd.algorithm.settings import Algorithm
from mmopd.config import Recipe, Student
from mmopd.errors import UserError
from mmopd.report.charts import curves
from mmopd.report.html import script_json, write_report
from mmopd.report.metrics import documented


@pytest.fixture
def page(tmp_path: Path) -> str:
    return write_report(write_run(tmp_path / "run")).read_text(encoding="utf-8")


def test_the_report_needs_nothing_but_itself(page: str) -> None:
    ours = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)=[\"'](?!data:|#)|@import|url\((?!data:)", ours)
    assert page.count("plotly.js v") == 1


def test_the_report_shows_results_curves_difficulty_time_and_tokens(page: str) -> None:
    for title in ("Results", "Training", "Difficulty", "Responses, token by token", "Time"):
        assert re.search(rf'<h2 id="[a-z-]+">{title}', page)
    assert "<b>60 %</b> <span>of the gap closed" in page
    assert "other, Digits: 3 of 8 requests failed" in page
    assert "3 min 20 s in all" in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert [chart["title"] for chart in data["curves"]] == [
        "Accuracy of the rollouts",
        "Return",
        "Where responses went",
        "Time of a step",
    ]
    assert [s["name"] for s in data["curves"][2]["series"]] == ["kept"]
    assert data["difficulty"][0]["before"] == [0.25, 0.25, 0.5]
    assert data["difficulty"][0]["after"] == [0.2, 0.4, 0.4]


def test_the_report_shows_what_the_image_does_for_each_token_where_that_was_asked(page: str) -> None:
    image, without = re.findall(r"<article.*?</article>", page, re.DOTALL)
    assert "--seen" not in without
    assert "image</abbr>" not in without
    assert re.findall(r"--seen:var\(--(\w+)\);--b:([0-9.]+)", image) == [
        ("with", "0.00"),
        ("without", "0.17"),
        ("with", "1.00"),
        ("with", "0.42"),
        ("with", "0.17"),
    ]
    assert image.count('|1.250">=</span>') == 1
    assert "image</abbr> <b>+0.950</b></span>" in image
    assert "likelier without the image" in page


def test_a_report_without_visual_advantage_does_not_speak_of_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = (run / "samples.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (run / "samples.jsonl").write_text(lines[0], encoding="utf-8")
    assert "without the image" not in write_report(run).read_text(encoding="utf-8")


def test_margins_are_a_band_around_their_median() -> None:
    margins = {
        f"margin/p{q}_{when}": q / 100 + later
        for q in (10, 50, 90)
        for when, later in (("before", 0.0), ("after", 1.0))
    }
    [chart] = curves([{"step": 3} | margins, {"step": 4}])
    before, after = chart["series"]
    assert (before["name"], before["low"], before["y"], before["high"]) == (
        "before",
        [0.1, None],
        [0.5, None],
        [0.9, None],
    )
    assert (after["name"], after["low"], after["y"], after["high"]) == ("after", [1.1, None], [1.5, None], [1.9, None])


def test_a_run_without_teachers_has_a_report(tmp_path: Path) -> None:
    algorithm = Algorithm.model_validate({"objective": {"kind": "grpo"}})
    (tmp_path / "recipe.yaml").write_text(
        settings_file.dump(Recipe(student=Student(model=Path("m")), mixture=Path("d"), algorithm=algorithm)),
        encoding="utf-8",
    )
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<dd>grpo</dd>" in page
    assert re.search(r"Fleet</abbr></dt><dd>none</dd>", page)


def test_scoring_and_visual_advantage_have_their_panels() -> None:
    numbers = {
        "scoring/requests": 90.0,
        "scoring/reused": 6.0,
        "scoring/hedged": 0.0,
        "scoring/failed/timeout": 2.0,
    }
    numbers |= {"visual_advantage/charts": 0.2, "visual_advantage/clock": 0.5, "scored_blind": 4.0, "absent_blind": 1.0}
    assert all(documented(name) for name in numbers)
    shown = {
        chart["title"]: [s["name"] for s in chart["series"]]
        for chart in curves([{"step": 0} | numbers, {"step": 1} | numbers])
    }
    assert shown == {
        "Visual advantage": ["charts", "clock"],
        "Scoring": ["requests", "reused"],
        "Scoring faults": ["failed/timeout", "with or without image"],
    }


def test_what_a_model_wrote_stays_text(page: str) -> None:
    assert "is 1 &lt; 2 &amp; &lt;/script&gt;&lt;b&gt;?" in page
    assert "<img src=x>" not in page
    assert script_json({"x": "</script>\u2028"}) == '{"x":"\\u003c/script>\\u2028"}'


def test_a_run_that_has_just_begun_has_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        settings_file.dump(Recipe(student=Student(model=Path("m")), fleet=Path("f"), mixture=Path("d"))),
        encoding="utf-8",
    )
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "<h2" not in page
    assert "0 of 100 steps" in page


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        write_report(tmp_path)


def test_a_number_that_was_not_finite_is_a_gap_in_the_curve() -> None:
    [chart] = curves([{"step": 0, "loss": 1.0}, {"step": 1, "loss": None}, {"step": 2, "loss": 3.0}])
    assert (chart["x"], [s["y"] for s in chart["series"]]) == ([0, 1, 2], [[1.0, None, 3.0]])
