"""200 odd rows through prepare, index, plan and encode; `benchmarks/fuzz.py` takes 5,000 of them, and then trains."""

from pathlib import Path

import pytest
from fuzzing import fuzz

from mmopd.demo import world


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged images
def test_odd_rows_are_kept_or_left_out_for_their_cause_and_totals_balance(tmp_path: Path) -> None:
    world.build_processor().save_pretrained(tmp_path / "student")
    totals = fuzz(tmp_path / "w", 200, 1, tmp_path / "student")
    assert totals.faults == []
    assert min(totals.kept, totals.left.total(), totals.encoded, totals.judged) > 40
