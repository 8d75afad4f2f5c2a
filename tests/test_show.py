"""`mmopd show`: which teacher scores which prompts, as in the run."""

import pytest
from rich.console import Console

from mmopd.commands.show import teachers_table
from mmopd.config import Fleet, Mixture
from mmopd.errors import UserError

TEACHERS = {
    "general": {"endpoints": ["http://t"], "weight": 2},
    "careful": {"endpoints": ["http://t"], "view": "described"},
}
VIEWS = {"described": {"images": "drop", "instead": "[image: {caption}] "}}
ROUTES = [{"modality": "text", "teacher": "general"}, {"teacher": {"general": 2, "careful": 1}}]


def lines(routes, *tasks):
    fleet = Fleet.model_validate({"teachers": TEACHERS, "routes": routes, "views": VIEWS})
    mixture = Mixture.model_validate(
        {"sources": {f"s{i}": {"shards": "p", "task": task} for i, task in enumerate(tasks)}}
    )
    console = Console(width=160)
    with console.capture() as capture:
        console.print(teachers_table(fleet, mixture))
    rows = [line.strip("│").split("│") for line in capture.get().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row] for row in rows]


def test_every_task_is_shown_with_its_teachers_their_shares_and_what_they_see():
    assert lines(ROUTES, "digit_sum", "additions", "digit_sum") == [
        ["digit_sum (image)", "general", "67%", "2", "all of it"],
        ["", "careful", "33%", "1", "images: drop, instead: '[image: {caption}] '"],
        ["additions (text)", "general", "100%", "2", "all of it"],
    ]


def test_a_task_that_nobody_scores_or_nobody_knows_is_named():
    with pytest.raises(UserError, match="no route for prompts of task 'digit_sum' and modality 'image'"):
        lines(ROUTES[:1], "digit_sum")
    with pytest.raises(UserError, match=r"no task 'digit_sums'.*did you mean 'digit_sum'\?"):
        lines(ROUTES, "digit_sums")
