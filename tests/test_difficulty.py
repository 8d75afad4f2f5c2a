"""The difficulty pass's books: nothing is counted twice, nothing is lost by a kill, and nothing is used for what it was not made from."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmopd import config
from mmopd.errors import UserError
from mmopd.prompts import Plan, Rows, Shards, difficulty, write_shards
from mmopd.records import Prompt
from mmopd.task.base import user_turn

SETTINGS = config.Difficulty()


def shards_of(folder: Path, rows: int) -> Shards:
    write_shards([Prompt(str(i), "t", "text", tuple(user_turn(f"{i}?", 0)), (), str(i)) for i in range(rows)], folder)
    return Shards(folder)


@pytest.fixture
def u_shaped(tmp_path: Path) -> tuple[dict[str, Shards], list[int]]:
    """A source of 100 rows: 40 never right, 40 always, the rest between."""
    return {"sums": shards_of(tmp_path / "sums", 100)}, [0] * 40 + [8] * 40 + [1, 2, 3, 4, 5, 6, 7] * 2 + [4] * 6


def count(path: Path, correct: list[int], made_from: dict[str, object]) -> None:
    with difficulty.Counts(path, made_from) as counts:
        for row, c in enumerate(correct):
            counts.add(f"sums/{row}", c, 8)


def test_counts_go_on_where_they_were_stopped(tmp_path: Path) -> None:
    path = tmp_path / "pass/counts.jsonl"
    with difficulty.Counts(path, {"student": "x"}) as counts:
        counts.add("sums/0", 3, 8)
        counts.add("sums/1", 0, 0)
    with path.open("a") as file:
        file.write('["sums/2", 5,')  # killed while writing
    with difficulty.Counts(path, {"student": "x"}) as counts:
        assert len(counts) == 2
        assert "sums/1" in counts
        assert "sums/2" not in counts
        counts.add("sums/2", 8, 8)
    with difficulty.Counts(path, {"student": "x"}) as counts:
        assert counts.of(shards_of(tmp_path / "sums", 3)) == ([3, 0, 8], [8, 0, 8])


def test_counts_and_results_are_refused_for_anything_else(tmp_path: Path) -> None:
    made_from: dict[str, object] = {"student": "x", "settings": {"attempts": 8}}
    count(tmp_path / "counts.jsonl", [1, 2], made_from)
    difficulty.save(tmp_path / "difficulty.json", {}, made_from)
    other = {"student": "y", "settings": {"attempts": 8}}
    with pytest.raises(UserError, match=r"counts\.jsonl: made from another student; delete it"):
        difficulty.Counts(tmp_path / "counts.jsonl", other)
    with pytest.raises(UserError, match=r"difficulty\.json: made from another student; delete it"):
        difficulty.load(tmp_path / "difficulty.json", other)
    for content in ("", "{}", "[]\n", "not json"):
        (tmp_path / "difficulty.json").write_text(content)
        (tmp_path / "counts.jsonl").write_text(content)
        with pytest.raises(UserError, match=r"difficulty\.json: not the result"):
            difficulty.load(tmp_path / "difficulty.json", made_from)
        with pytest.raises(UserError, match=r"counts\.jsonl: not the counts"):
            difficulty.Counts(tmp_path / "counts.jsonl", made_from)
    with pytest.raises(UserError, match="run the difficulty pass first"):
        difficulty.load(tmp_path / "nowhere.json", made_from)


def test_the_origin_changes_with_data_student_settings_and_what_else_matters(
    tmp_path: Path, u_shaped: tuple[dict[str, Shards], list[int]]
) -> None:
    student = tmp_path / "student"
    student.mkdir()
    (student / "model.safetensors").write_bytes(b"weights")
    first = difficulty.origin(u_shaped[0], student, SETTINGS, seed=0)
    assert first == difficulty.origin(u_shaped[0], student, SETTINGS, seed=0)
    others = [
        difficulty.origin({"sums": shards_of(tmp_path / "others", 3)}, student, SETTINGS, seed=0),
        difficulty.origin(u_shaped[0], student, config.Difficulty(attempts=4), seed=0),
        difficulty.origin(u_shaped[0], student, SETTINGS, seed=1),
    ]
    (student / "model.safetensors").write_bytes(b"other weights")
    others.append(difficulty.origin(u_shaped[0], student, SETTINGS, seed=0))
    assert first not in others


def test_a_u_shaped_source_gets_weights_that_the_plan_follows(tmp_path: Path, u_shaped: tuple[dict[str, Shards], list[int]]) -> None:
    sources, correct = u_shaped
    count(tmp_path / "counts.jsonl", correct, {})
    with difficulty.Counts(tmp_path / "counts.jsonl", {}) as counts:
        measured = difficulty.measure(counts, sources, SETTINGS)
    assert measured["sums"].shape == "u"
    assert min(measured["sums"].weights) > 0
    assert max(measured["sums"].weights) <= SETTINGS.cap
    difficulty.save(tmp_path / "difficulty.json", measured, {"a": (1,)})
    assert difficulty.load(tmp_path / "difficulty.json", {"a": (1,)}) == difficulty.load(tmp_path / "difficulty.json") == measured

    before, after = difficulty.histogram(measured["sums"])
    assert before.tolist() == [40, 2, 2, 2, 8, 2, 2, 2, 40]
    assert after.sum() == pytest.approx(100)
    assert after[1:8].sum() > 1.8 * before[1:8].sum()

    plan = Plan({"sums": Rows(100, sources["sums"].fingerprint, measured["sums"].weights)}, {"sums": 1}, 0)
    drawn = np.bincount([correct[row] for _, row in plan.draw(10_000)], minlength=9) / 100
    assert drawn == pytest.approx(after, abs=0.3)


def test_an_incomplete_pass_gives_no_weights(tmp_path: Path, u_shaped: tuple[dict[str, Shards], list[int]]) -> None:
    sources, correct = u_shaped
    count(tmp_path / "counts.jsonl", correct[:-1], {})
    with difficulty.Counts(tmp_path / "counts.jsonl", {}) as counts, pytest.raises(KeyError, match="sums/99"):
        difficulty.measure(counts, sources, SETTINGS)


def test_rows_that_could_not_be_judged_are_drawn_and_not_shown() -> None:
    measured = difficulty.Measured((0, 0, 3, 1), (8, 0, 3, 2), "flat", (1.0, 1.0, 1.0, 1.0))
    before, after = difficulty.histogram(measured)
    assert before.tolist() == after.tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_the_picture_is_a_png_for_one_source_or_several_or_unjudged_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    correct = tuple(int(c) for c in rng.choice(9, 400, p=np.array([30, 3, 3, 3, 3, 3, 3, 4, 48]) / 100))
    one = difficulty.Measured(correct, (8,) * 400, "u", tuple(1.0 if c in (0, 8) else 4.0 for c in correct))
    unjudged = difficulty.Measured((0, 0), (0, 0), "flat", (1.0, 1.0))
    for number, sources in enumerate(({"a": one}, {"a": one, "b": one, "c": unjudged}, {"c": unjudged})):
        path = tmp_path / f"{number}.png"
        difficulty.draw(path, sources)
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            assert image.format == "PNG"
