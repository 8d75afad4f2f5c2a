"""150 odd rows through prepare, index, plan and encode; `benchmarks/fuzz.py` takes 5,000 of them, and then trains."""

from pathlib import Path

import pytest
from fuzzing import fuzz

from mmopd.demo import world


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    world.build_processor().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged images
@pytest.mark.parametrize("seed", [1, 2])
def test_odd_rows_are_kept_or_left_out_for_their_cause_and_totals_balance(
    tmp_path: Path, student: Path, seed: int
) -> None:
    totals = fuzz(tmp_path / "w", 150, seed, student)
    assert totals.faults == []
    assert min(totals.kept, totals.left.total(), totals.encoded, totals.judged) > 40
