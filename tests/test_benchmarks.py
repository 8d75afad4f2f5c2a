"""The multimodal suites end to end: rows in the published columns, planted answers, known scores."""

from collections.abc import Mapping
from pathlib import Path

import published_rows
import pyarrow.parquet as pq
import pytest
from answering_server import Server
from published_rows import PUBLISHED

from mmopd.catalog import shipped
from mmopd.config import Suite
from mmopd.errors import DataError
from mmopd.evaluate import BenchmarkScore, evaluate, read_suite, second_rule
from mmopd.evaluate.tasks import prepare

SUITES = [shipped() / "eval" / f"{name}.yaml" for name in ("paper-mm", "more-mm")]


@pytest.fixture(scope="module")
def scores(
    server: None, hub: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[tuple[str, bool], BenchmarkScore]:
    """Return the record of each column, for a student that thinks and for one that does not."""
    folder = tmp_path_factory.mktemp("benchmarks")
    published_rows.write_archive(hub)
    rows = [row for suite in SUITES for row in read_suite(suite, folder).benchmarks]
    local = Suite(benchmarks=published_rows.write(rows, folder), timeout=900)
    found = {}
    for thinks in (False, True):
        with Server(lambda prompt, images, thinks=thinks: published_rows.answer(prompt, thinks)) as answering:
            for record in evaluate(answering.endpoint, local, out=folder / str(thinks)):
                found[record.column, thinks] = record
    return found


@pytest.mark.parametrize("thinks", [False, True], ids=["answers", "thinks"])
@pytest.mark.parametrize("column", PUBLISHED)
def test_the_second_rule_judges_the_same_responses(
    scores: Mapping[tuple[str, bool], BenchmarkScore], column: str, thinks: bool
) -> None:
    more = scores[column, thinks].more
    if column not in ("DynaMath", "WeMath", "LogicVista"):
        assert more == {}
        return
    assert more.keys() == {second_rule.NAME, f"{second_rule.NAME}_stderr"}
    assert more[second_rule.NAME] == pytest.approx(PUBLISHED[column].second())


def test_every_column_of_the_suites_has_rows() -> None:
    assert [row.column for suite in SUITES for row in read_suite(suite, Path.cwd()).benchmarks] == list(PUBLISHED)


@pytest.mark.parametrize("thinks", [False, True], ids=["answers", "thinks"])
@pytest.mark.parametrize("column", PUBLISHED)
def test_planted_answers_get_their_known_score(
    scores: Mapping[tuple[str, bool], BenchmarkScore], column: str, thinks: bool
) -> None:
    record = scores[column, thinks]
    assert (record.status, record.reason, record.n) == ("ok", "", len(PUBLISHED[column].cases))
    assert record.score == pytest.approx(PUBLISHED[column].score(thinks))
    assert (record.stderr is None) == (column in ("MMStar", "MMMU", "MMMU-Pro"))


@pytest.mark.parametrize(
    ("column", "missing"),
    [
        ("VisuLogic", "label"),
        ("VisuLogic", "image_path"),
        ("MMStar", "C"),
        ("DocVQA", "answers"),
        ("InfoVQA", "answers"),
    ],
)
def test_rows_without_a_column_that_lmms_eval_does_not_miss_are_refused(
    column: str, missing: str, tmp_path: Path
) -> None:
    """Without these lmms-eval gives a score, such as 0 for DocVQA without answers."""
    rows = [row for suite in SUITES for row in read_suite(suite, tmp_path).benchmarks if row.column == column]
    [local] = published_rows.write(rows, tmp_path)
    pq.write_table(pq.read_table(local.data).drop_columns([missing]), local.data)
    with pytest.raises(DataError, match=f"no column '{missing}', which the task {local.task} reads"):
        prepare(local, tmp_path / "task")
