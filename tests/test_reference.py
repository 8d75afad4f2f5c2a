"""The reference of all settings: complete, equal to the code, and printed key by key."""

import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from mmopd.commands import reference
from mmopd.errors import UserError

PAGES = Path(__file__).parents[1] / "docs" / "reference"
KEYS = [key for page in reference.PAGES for key in reference.keys(page)]


def explained(key: str) -> str:
    out = StringIO()
    reference.explain(key, Console(file=out, width=400, highlight=False))
    return out.getvalue()


def test_the_pages_are_those_of_the_models() -> None:
    for name, text in reference.pages().items():
        assert (PAGES / name).read_text(encoding="utf-8") == text, (
            f"{name}: rewrite it by `python -m mmopd.commands.reference`"
        )


@pytest.mark.parametrize("key", KEYS, ids=lambda key: f"{key.page}:{key.section.title}.{key.name}")
def test_every_key_has_a_description_that_is_a_sentence(key: reference.Key) -> None:
    text = key.field.description or ""
    assert len(text) >= 20
    assert text[0].isupper() or text[0] in "`0123456789"
    assert not text.endswith(".")  # the pages and `--explain` add the full stop
    assert "  " not in text


def test_every_group_of_settings_says_what_it_is() -> None:
    for page, (model, _) in reference.PAGES.items():
        for section in reference.sections(model):
            assert section.about, f"{page}: {section.title}"


def test_a_key_is_explained_with_its_type_range_default_and_file() -> None:
    said = explained("train.lr")
    assert "train.lr  in recipes/*.yaml" in said
    assert "number, > 0; default 1e-06" in said
    assert "Learning rate of Adam. 1e-6 as in the paper" in said


def test_the_last_name_of_a_key_is_enough() -> None:
    assert explained("delta") == explained("margin.delta") == explained("algorithm.margin.delta")


def test_a_name_of_several_keys_explains_all_of_them() -> None:
    said = explained("timeout")
    assert all(key in said for key in ("train.timeout", "teachers.NAME.timeout", "timeout  in eval/*.yaml"))


def test_a_whole_path_is_that_key_alone() -> None:
    assert "train.timeout" in explained("train.timeout")
    assert "teachers" not in explained("train.timeout").splitlines()[0]
    assert explained("teachers.vision.engine.port") == explained("teachers.NAME.engine.port")


def test_a_section_explains_its_keys() -> None:
    said = explained("algorithm.balance")
    assert all(f"algorithm.balance.{name}" in said for name in ("scope", "ratio", "tolerance"))


def test_the_settings_of_an_objective_are_explained_with_its_kind() -> None:
    assert "with kind: exopd" in explained("algorithm.objective.scale")


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no key 'train.stepz'; did you mean 'train.steps'"):
        explained("train.stepz")


def test_explaining_loads_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['mmopd', 'show', '--explain', 'train.lr']\n"
        "from mmopd.cli import app\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True)
    assert "Learning rate of Adam" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
