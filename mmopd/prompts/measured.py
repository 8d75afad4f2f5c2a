"""How often the untrained student answers each row of a source rightly; reading it loads no torch."""

import json
from dataclasses import dataclass

from mmopd.prompts.ledger import check_version
from mmopd.prompts.shards import Shards

KIND = "difficulty"  # the folder next to the shards in which counts are kept


@dataclass(frozen=True, slots=True)
class Measured:
    """Result of the pass for one source of P rows."""

    correct: tuple[int, ...]  # [P] right answers
    attempts: tuple[int, ...]  # [P] answers that the verifier could judge
    shape: str  # shape of the histogram of correct / attempts
    weights: tuple[float, ...]  # [P] for `Rows.weights`


def latest_counts(shards: Shards) -> dict[int, tuple[int, int]]:
    """Return (right answers, judged answers) by row, from the newest counts of these rows that are kept next to them.

    Counts are kept for each student and its way of sampling; those that cannot be read are passed over.

    Returns:
        Nothing if there are none.
    """
    files = [path for path in (shards.folder / KIND).glob("*.jsonl") if path.is_file()]
    for path in sorted(files, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            head, *lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
            about = json.loads(head)
            check_version(about)
            if about["made_from"]["data"] == shards.fingerprint:
                return {int(row): (int(right), int(judged)) for row, right, judged in map(json.loads, lines)}
        except (OSError, ValueError, TypeError, KeyError):
            continue
    return {}
