"""The counts of the difficulty pass: nothing is counted twice, a kill loses nothing, and counts are used only for the
data they were made from.
"""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mmopd.algorithm.settings import Difficulty
from mmopd.errors import UserError
from mmopd.prompts import PromptPlan, Rows, Shards, difficulty_counts, write_shards
from mmopd.records import Prompt
from mmopd.task.base import user_turn

SETTINGS = Difficulty()


def shards_of(folder: Path, rows: int) -> Shards:
    write_shards([Prompt(str(i), "t", "text", tuple(user_turn(f"{i}?", 0)), (), str(i)) for i in range(rows)], folder)
    return Shards(folder)


@pytest.fixture
def u_shaped(tmp_path: Path) -> tuple[dict[str, Shards], list[int]]:
    """Return a source of 100 rows: 40 never right, 40 always right, the rest in between."""
    return {"sums": shards_of(tmp_path / "sums", 100)}, [0] * 40 + [8] * 40 + [1, 2, 3, 4, 5, 6, 7] * 2 + [4] * 6


def count(path: Path, correct: list[int], made_from: dict[str, object]) -> None:
    with difficulty_counts.Counts(path, made_from) as counts:
        for row, c in enumerate(correct):
            counts.add(row, c, 8)


def test_counts_go_on_where_they_were_stopped(tmp_path: Path) -> None:
    path = tmp_path / "pass/counts.jsonl"
    with difficulty_counts.Counts(path, {"student": "x"}) as counts:
        counts.add(0, 3, 8)
        counts.add(1, 0, 0)
    with path.open("a", encoding="utf-8") as file:
        file.write("[2, 5,")  # killed while writing
    with difficulty_counts.Counts(path, {"student": "x"}) as counts:
        assert len(counts) == 2
        assert 1 in counts
        assert 2 not in counts
        counts.add(2, 8, 8)
    with difficulty_counts.Counts(path, {"student": "x"}) as counts:
        assert counts.of(3) == ([3, 0, 8], [8, 0, 8])


def test_two_runs_do_not_write_the_same_counts_at_once(tmp_path: Path) -> None:
    path = tmp_path / "counts.jsonl"
    with difficulty_counts.Counts(path, {}) as counts:
        counts.add(0, 1, 8)
        with pytest.raises(UserError, match=r"counts\.jsonl: another run is measuring"):
            difficulty_counts.Counts(path, {})
    with difficulty_counts.Counts(path, {}) as counts:
        assert 0 in counts


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"file/counts\.jsonl: the counts of the difficulty pass cannot be kept here"):
        difficulty_counts.Counts(tmp_path / "file" / "counts.jsonl", {})


def test_counts_are_refused_for_anything_else(tmp_path: Path) -> None:
    made_from: dict[str, object] = {"student": "x", "sampling": {"attempts": 8}}
    count(tmp_path / "counts.jsonl", [1, 2], made_from)
    with pytest.raises(UserError, match=r"counts\.jsonl: made from another student; delete it"):
        difficulty_counts.Counts(tmp_path / "counts.jsonl", {**made_from, "student": "y"})
    for content in ("{}", "[]\n", "not json"):
        (tmp_path / "difficulty.json").write_text(content, encoding="utf-8")
        (tmp_path / "counts.jsonl").write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"difficulty\.json: not the result"):
            difficulty_counts.load(tmp_path / "difficulty.json")
        with pytest.raises(UserError, match=r"counts\.jsonl: not the counts"):
            difficulty_counts.Counts(tmp_path / "counts.jsonl", made_from)
    with pytest.raises(UserError, match="run the difficulty pass first"):
        difficulty_counts.load(tmp_path / "nowhere.json")


def test_counts_are_next_to_the_shards_and_depend_on_data_student_and_sampling_but_not_on_policy(
    tmp_path: Path, u_shaped: tuple[dict[str, Shards], list[int]]
) -> None:
    def file(shards: Shards = u_shaped[0]["sums"], student: str = "s", max_tokens: int = 9, **settings: object) -> Path:
        return difficulty_counts.counts_file(
            shards,
            difficulty_counts.origin(
                shards, student, Difficulty.model_validate(settings), max_tokens=max_tokens, threshold=0.5
            ),
        )

    assert file().parent.parent == u_shaped[0]["sums"].folder
    assert file() == file(cap=2) == file(policy="drop_easy") == file(shape="flat")
    others = {
        file(student="t"),
        file(attempts=4),
        file(temperature=0.5),
        file(max_tokens=8),
        file(shards_of(tmp_path / "others", 3)),
    }
    assert len(others | {file()}) == 6


@pytest.mark.parametrize(
    ("policy", "weights"), [("drop_easy", [1, 1, 1, 0, 1]), ("frontier", [0, 0.4375, 1, 0, 0.359375])]
)
def test_the_policies_of_others_can_be_chosen(tmp_path: Path, policy: str, weights: list[float]) -> None:
    with difficulty_counts.Counts(tmp_path / "counts.jsonl", {}) as counts:
        for row, (correct, attempts) in enumerate([(0, 8), (1, 8), (4, 8), (8, 8), (0, 0)]):
            counts.add(row, correct, attempts)
        measured = difficulty_counts.measure(counts, 5, Difficulty.model_validate({"policy": policy}))
        assert measured.weights == pytest.approx(weights)
        plan = PromptPlan({"sums": Rows(5, "f", measured.weights)}, {"sums": 1}, 0)
        drawn = np.bincount([row for _, row in plan.draw(1000)], minlength=5)
        assert drawn / 1000 == pytest.approx(np.array(weights) / sum(weights), abs=0.01)


def test_a_policy_that_leaves_nothing_is_an_error(tmp_path: Path) -> None:
    with difficulty_counts.Counts(tmp_path / "counts.jsonl", {}) as counts:
        counts.add(0, 8, 8)
        for policy in ("drop_easy", "frontier"):
            with pytest.raises(UserError, match=f"{policy} leaves no prompt"):
                difficulty_counts.measure(counts, 1, Difficulty.model_validate({"policy": policy}))


def test_the_table_says_how_many_rows_are_never_and_always_right(tmp_path: Path) -> None:
    measured = difficulty_counts.Measured((0, 8, 3, 0), (8, 8, 8, 0), "mirrored_j", (1.0, 1.0, 4.0, 1.0))
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(difficulty_counts.table({"sums": measured}))
    line = next(line for line in console.export_text().splitlines() if "sums" in line)
    assert line.replace("│", " ").split() == ["sums", "4", "1", "1", "1", "1", "mirrored", "j", "1.00", "to", "4.00"]


def test_a_u_shaped_source_gets_weights_that_the_plan_follows(
    tmp_path: Path, u_shaped: tuple[dict[str, Shards], list[int]]
) -> None:
    sources, correct = u_shaped
    count(tmp_path / "counts.jsonl", correct, {})
    with difficulty_counts.Counts(tmp_path / "counts.jsonl", {}) as counts:
        measured = {"sums": difficulty_counts.measure(counts, 100, SETTINGS)}
    assert measured["sums"].shape == "u"
    assert min(measured["sums"].weights) > 0
    assert max(measured["sums"].weights) <= SETTINGS.cap
    difficulty_counts.save(tmp_path / "difficulty.json", measured, {"sums": sources["sums"].fingerprint})
    assert difficulty_counts.load(tmp_path / "difficulty.json") == measured

    before, after = difficulty_counts.histogram(measured["sums"])
    assert before.tolist() == [40, 2, 2, 2, 8, 2, 2, 2, 40]
    assert after.sum() == pytest.approx(100)
    assert after[1:8].sum() > 1.8 * before[1:8].sum()

    plan = PromptPlan({"sums": Rows(100, sources["sums"].fingerprint, measured["sums"].weights)}, {"sums": 1}, 0)
    drawn = np.bincount([correct[row] for _, row in plan.draw(10_000)], minlength=9) / 100
    assert drawn == pytest.approx(after, abs=0.3)


def test_an_incomplete_pass_gives_no_weights(tmp_path: Path, u_shaped: tuple[dict[str, Shards], list[int]]) -> None:
    count(tmp_path / "counts.jsonl", u_shaped[1][:-1], {})
    with difficulty_counts.Counts(tmp_path / "counts.jsonl", {}) as counts, pytest.raises(KeyError, match="99"):
        difficulty_counts.measure(counts, 100, SETTINGS)


def test_rows_that_could_not_be_judged_are_drawn_and_not_shown() -> None:
    measured = difficulty_counts.Measured((0, 0, 3, 1), (8, 0, 3, 2), "flat", (1.0, 1.0, 1.0, 1.0))
    before, after = difficulty_counts.histogram(measured)
    assert before.tolist() == after.tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_the_picture_is_a_png_for_one_source_or_several_or_unjudged_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    correct = tuple(int(c) for c in rng.choice(9, 400, p=np.array([30, 3, 3, 3, 3, 3, 3, 4, 48]) / 100))
    one = difficulty_counts.Measured(correct, (8,) * 400, "u", tuple(1.0 if c in (0, 8) else 4.0 for c in correct))
    unjudged = difficulty_counts.Measured((0, 0), (0, 0), "flat", (1.0, 1.0))
    for number, sources in enumerate(({"a": one}, {"a": one, "b": one, "c": unjudged}, {"c": unjudged})):
        path = tmp_path / f"{number}.png"
        difficulty_counts.draw(path, sources)
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            assert image.format == "PNG"
