"""The multimodal columns of the paper, end to end: rows in the published columns, planted answers, known scores."""

from collections.abc import Mapping
from pathlib import Path

import published_rows
import pytest
from answering_server import Server
from published_rows import PAPER

from mmopd.catalog import shipped
from mmopd.evaluate import BenchmarkScore, evaluate, read_suite, second_rule


@pytest.fixture(scope="module")
def scores(
    server: None, hub: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[tuple[str, bool], BenchmarkScore]:
    """Return the record of each column, for a student that thinks and for one that does not."""
    folder = tmp_path_factory.mktemp("benchmarks")
    published_rows.write_archive(hub)
    suite = read_suite(shipped() / "eval" / "paper-mm.yaml", folder)
    local = suite.model_copy(update={"benchmarks": published_rows.write(suite.benchmarks, folder), "timeout": 900})
    found = {}
    for thinks in (False, True):
        with Server(lambda prompt, images, thinks=thinks: published_rows.answer(prompt, thinks)) as answering:
            for record in evaluate(answering.endpoint, local, out=folder / str(thinks)):
                found[record.column, thinks] = record
    return found


@pytest.mark.parametrize("thinks", [False, True], ids=["answers", "thinks"])
@pytest.mark.parametrize("column", PAPER)
def test_the_second_rule_judges_the_same_responses(
    scores: Mapping[tuple[str, bool], BenchmarkScore], column: str, thinks: bool
) -> None:
    more = scores[column, thinks].more
    if column not in ("DynaMath", "WeMath", "LogicVista"):
        assert more == {}
        return
    assert more.keys() == {second_rule.NAME, f"{second_rule.NAME}_stderr"}
    assert more[second_rule.NAME] == pytest.approx(PAPER[column].second())


def test_every_column_of_the_suite_has_rows() -> None:
    suite = read_suite(shipped() / "eval" / "paper-mm.yaml", Path.cwd())
    assert [benchmark.column for benchmark in suite.benchmarks] == list(PAPER)


@pytest.mark.parametrize("thinks", [False, True], ids=["answers", "thinks"])
@pytest.mark.parametrize("column", PAPER)
def test_planted_answers_get_their_known_score(
    scores: Mapping[tuple[str, bool], BenchmarkScore], column: str, thinks: bool
) -> None:
    record = scores[column, thinks]
    assert (record.status, record.reason, record.n) == ("ok", "", len(PAPER[column].cases))
    assert record.score == pytest.approx(PAPER[column].score(thinks))
