"""2,000 mutations of the shipped files, and overrides of their keys: each works or ends in one clear message."""

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from mutations import FileLoader, mutated, override, paths
from rich.console import Console

from mmopd import catalog
from mmopd.commands.compare import plan_runs, resolve
from mmopd.commands.show import show
from mmopd.errors import UserError
from mmopd.evaluate.run import read_suite
from mmopd.evaluate.tasks import read_task
from mmopd.task.load import load_tasks
from mmopd.teacher.router import check_routes

SEED = 19
FILES = 2000
OVERRIDES = 400
ROOT = catalog.shipped()
TASKS = load_tasks()
SHIPPED = sorted(path for kind in catalog.KINDS for path in (ROOT / kind).rglob("*.yaml"))
FOREIGN = re.compile(
    r"<class|Traceback|pydantic|Value error|NoneType|\[type=|object at 0x|<unicode string>|Input|Tuple"
)


def recipe(path: Path, overrides: tuple[str, ...] = ()) -> None:
    show(catalog.load_recipe(path, overrides=overrides), Console(file=io.StringIO(), width=200))


def fleet(path: Path) -> None:
    check_routes(catalog.load_fleet(path), TASKS, [])


def mixture(path: Path) -> None:
    for source in catalog.load_mixture(path).sources.values():
        source.weight_at(7)


def comparison(path: Path) -> None:
    read = catalog.load_comparison(path)
    for run in list(plan_runs(read, Path("out")).values())[:1]:
        resolve(read, run)


READERS: dict[str, Callable[[Path], object]] = {
    "recipes": recipe,
    "teachers": fleet,
    "data": mixture,
    "eval": lambda path: read_suite(path, Path.cwd()),
    "tasks": read_task,
}


def message_of(path: Path) -> str:
    """Return what a user is told of a file when a command reads it; empty if it can be used."""
    read = comparison if path.stem.startswith("compare_") else READERS[path.parent.name]
    try:
        read(path)
    except UserError as error:
        return str(error)
    return ""


def check(message: str, *names: str) -> None:
    assert any(name in message for name in names), message
    assert not FOREIGN.search(message), message
    assert len(message.splitlines()) <= 9, message
    assert max(map(len, message.splitlines())) <= 900, message


@pytest.fixture
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, str]:
    """Return the text of a copy of each shipped file; the copies are in the current folder."""
    catalog.init(tmp_path)
    monkeypatch.chdir(tmp_path)
    return {tmp_path / path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in SHIPPED}


def test_a_mutated_file_can_be_used_or_a_message_names_it(copies: dict[Path, str]) -> None:
    dice = random.Random(SEED)
    refused = 0
    for i in range(FILES):
        path, text = list(copies.items())[i % len(copies)]
        path.write_bytes(data := mutated(text, dice))
        try:
            if message := message_of(path):
                refused += 1
                check(message, path.name, "no such file", "of the comparison")
        except BaseException as error:
            error.add_note(f"mutation {i}, of {path.name}: {data[-2000:]!r}")
            raise
        path.write_text(text, encoding="utf-8")
    assert refused > FILES / 2


def test_an_override_can_be_used_or_a_message_names_it(copies: dict[Path, str]) -> None:
    dice = random.Random(SEED)
    recipes = [one for one in copies.items() if one[0].parent.name == "recipes" and "compare" not in one[0].stem]
    refused = 0
    for i in range(OVERRIDES):
        path, text = recipes[i % len(recipes)]
        given = override(text, dice)
        try:
            recipe(path, (given,))
        except UserError as error:
            refused += 1
            check(str(error), repr(given)[1:40], f"{given.partition('=')[0]}:", "no such file")
        except BaseException as error:
            error.add_note(f"override {i}, of {path.name}: {given[:2000]!r}")
            raise
    assert refused > OVERRIDES / 2


def test_a_value_of_the_wrong_kind_is_named_by_its_file_and_its_keys(copies: dict[Path, str]) -> None:
    for path, text in copies.items():
        data = yaml.load(text, FileLoader)
        for keys in paths(data):
            if path.parent.name == "tasks" or "set" in keys:  # what these hold, others read
                continue
            inside: Any = data
            for key in keys[:-1]:
                inside = inside[key]
            before = inside[keys[-1]]
            inside[keys[-1]] = [{"no such key": {}}]
            path.write_text(json.dumps(data), encoding="utf-8")
            check(message := message_of(path), path.name)
            assert all(str(key) in message for key in keys), message
            inside[keys[-1]] = before
        path.write_text(text, encoding="utf-8")
