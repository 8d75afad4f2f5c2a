"""Commands in locales without UTF-8, output that nobody reads, and files in any encoding."""

import ast
import codecs
import io
import os
import re
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

import mmopd
from mmopd import catalog
from mmopd.commands import terminal
from mmopd.errors import ConfigError, UserError
from mmopd.evaluate.tasks import read_task
from mmopd.prompts import Shards, index_tar
from mmopd.records import Prompt
from mmopd.runtime.processes import Children
from mmopd.runtime.progress import Stages
from mmopd.runtime.python import command, environment

ROOT = Path(__file__).parents[1]
SCOPES = ("mmopd", "modalities", "data", "eval", "tests", "benchmarks", "requirements")
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a workspace with umlauts in the texts and the names of its files."""
    monkeypatch.chdir(tmp_path)
    turn = ({"role": "user", "content": [{"type": "text", "text": "Wie groß ist …?"}]},)
    mmopd.write_shards([Prompt("größe/0", "additions", "text", turn, (), "drei")], tmp_path / "shards")
    mixture = "# für …\nsources: {zähler: {shards: shards, task: additions}}\n"
    recipe = (catalog.shipped() / "recipes" / "demo.yaml").read_text(encoding="utf-8")
    for name, text in {"data/übung.yaml": mixture, "recipes/übung.yaml": f"# für Übungen …\n{recipe}"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "sums.jsonl").write_bytes('{"question": "Wie groß ist 1+1?", "answer": "2"}\n'.encode() * 3)
    return tmp_path


def run(env: dict[str, str], *arguments: str, **streams: int) -> "subprocess.CompletedProcess[bytes]":
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    # Without the variables that a test leaves that has called `mmopd.cli.main` in this process.
    own = {name: value for name, value in os.environ.items() if name not in environment()}
    return subprocess.run(command("-m", "mmopd", *arguments), env=own | env, check=False, timeout=600, **streams)


COMMANDS = [
    (["show", "recipes/übung.yaml"], 0),
    (["show", "data/übung.yaml"], 0),
    (["show", "--explain", "train.lr"], 0),
    (["plan", "recipes/übung.yaml"], 6),  # its models are missing
    (["doctor"], None),
    (["index", "shards"], 0),
    (["init", "größe"], 0),
    (["prepare", "data/generic.py", "fürs", "--set", "data=sums.jsonl", "--set", "task=additions", "--workers=2"], 0),
    (["show", "recipes/fehlt_ü.yaml"], ConfigError.exit_status),
    (["--help"], 0),
]


@pytest.mark.parametrize(
    ("arguments", "status"), COMMANDS, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_a_command_works_in_a_locale_without_utf_8(here: Path, arguments: list[str], status: int | None) -> None:
    done = run(ASCII, *arguments)
    assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    assert b"UnicodeEncodeError" not in done.stderr + done.stdout
    assert done.returncode in ({0, 1} if status is None else {status}), done.stderr.decode(errors="replace")


@pytest.mark.parametrize("encoding", ["latin-1", "gbk", "utf-8"])
def test_a_command_works_on_a_terminal_with_another_encoding(here: Path, encoding: str) -> None:
    done = run(ASCII | {"PYTHONIOENCODING": encoding}, "show", "data/übung.yaml")
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert done.stdout.count("data/übung.yaml".encode()) == 1  # a name from the command line keeps its bytes
    assert ("zähler".encode("latin-1") in done.stdout) == (encoding == "latin-1")


def test_letters_that_the_terminal_lacks_are_spelled_out_and_boxes_are_ascii(here: Path) -> None:
    shown = run(ASCII, "show", "data/übung.yaml").stdout
    assert rb"z\xe4hler" in shown
    assert "data/übung.yaml".encode() in shown  # a name from the command line keeps its bytes
    assert b"... index shards" in run(ASCII, "index", "shards").stdout
    table = run(ASCII, "show", "recipes/übung.yaml").stdout
    assert b"+----" in table
    assert table.isascii()


def test_a_text_that_the_locale_cannot_express_is_an_error_with_the_way_out(here: Path) -> None:
    done = run(ASCII, "show", "recipes/übung.yaml", "student.model=größe")
    assert done.returncode == UserError.exit_status
    assert b"set LC_ALL=C.UTF-8, or PYTHONUTF8=1" in done.stderr


def test_a_run_folder_that_the_locale_cannot_express_is_an_error_before_anything_starts(here: Path) -> None:
    done = run(ASCII, "train", "recipes/übung.yaml", "prepare=null", "--run", "läufe/1")
    assert done.returncode == UserError.exit_status
    assert b"set LC_ALL=C.UTF-8, or PYTHONUTF8=1" in done.stderr
    assert not Path("läufe").exists()


def test_files_are_the_same_in_any_locale(here: Path) -> None:
    made = ["data/generic.py", "--set", "data=sums.jsonl", "--set", "task=additions", "--workers=1"]
    for name, env in (("utf8", {"PYTHONUTF8": "1"}), ("ascii", ASCII)):
        assert run(env, "prepare", made[0], name, *made[1:]).returncode == 0
    one, two = ({path.name: path.read_bytes() for path in (here / name).iterdir()} for name in ("utf8", "ascii"))
    assert one == two
    assert all("Wie groß" in str(row.messages) for row in Shards(here / "ascii"))


def test_a_file_in_another_encoding_is_named_with_its_line(here: Path) -> None:
    for name, read in (
        ("recipes/latin.yaml", catalog.load_recipe),
        ("data/latin.yaml", catalog.load_mixture),
        ("data/latin.yaml", lambda name: catalog.is_mixture(Path(name))),
        ("eval/latin.yaml", catalog.load_suite),
        ("eval/task.yaml", lambda name: read_task(Path(name))),
    ):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes("# a\n# größe\n".encode("latin-1"))
        with pytest.raises(ConfigError, match=rf"{name}: line 2 is not UTF-8: save the file in this encoding"):
            read(name)


def test_the_mark_of_an_encoding_is_no_part_of_the_first_key(here: Path) -> None:
    Path("data/marked.yaml").write_bytes(codecs.BOM_UTF8 + Path("data/übung.yaml").read_bytes().partition(b"\n")[2])
    assert [*catalog.load_mixture("data/marked.yaml").sources] == ["zähler"]


def test_a_tar_of_another_tool_has_its_keys_in_any_locale(here: Path) -> None:
    with (
        tarfile.open(next(Path("shards").glob("*.tar"))) as ours,
        tarfile.open("shards/other.tar", "w", format=tarfile.USTAR_FORMAT, encoding="utf-8") as other,
    ):
        for member in ours.getmembers():
            other.addfile(member.replace(name=member.name.replace("0", "1")), ours.extractfile(member))
    index_tar(Path("shards/other.tar"), None)
    before = {path.name: path.read_bytes() for path in Path("shards").iterdir()}
    assert run(ASCII, "index", "shards").returncode == 0
    assert {path.name: path.read_bytes() for path in Path("shards").iterdir()} == before


def test_logs_of_child_processes_are_utf_8_in_any_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ASCII.items():
        monkeypatch.setenv(name, value)
    with Children() as children:
        child = children.start("x", command("-c", r"print('gr\xf6\xdfe \u2026 \udcc3')"), tmp_path / "x.log")
        assert child.wait(60) == 0
        assert child.log.read_text(encoding="utf-8").strip() == r"größe … \udcc3"


@pytest.mark.parametrize("arguments", [["show", "recipes/demo.yaml"], ["--help"], ["doctor"], ["index", "shards"]])
@pytest.mark.parametrize("closed", [["stdout"], ["stdout", "stderr"]])
def test_output_that_nobody_reads_ends_a_command_quietly(here: Path, arguments: list[str], closed: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run({}, *arguments, **dict.fromkeys(closed, writing))
    finally:
        os.close(writing)
    assert done.returncode == terminal.NOBODY_READS == 141
    assert not done.stderr


def test_a_stage_has_a_spinner_that_the_terminal_can_show() -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="replace")
    with Stages(Console(file=shown, force_terminal=True)) as stages, stages.stage("work") as stage:
        stages.progress.refresh()
        stage.advance()
        assert stages.progress.get_renderable() is not None
        assert stages.progress.columns[0].spinner.name == "line"  # type: ignore[attr-defined, union-attr]


def binary(call: ast.Call) -> bool:
    """Return true if an argument of a call is a binary mode, such as "rb"."""
    values = [*call.args, *(word.value for word in call.keywords)]
    return any(isinstance(one, ast.Constant) and re.fullmatch(r"[rwax+]*b[rwax+]*", str(one.value)) for one in values)


def calls_without_encoding(path: Path) -> Iterator[int]:
    """Yield the lines of calls that read or write text in the encoding of the locale.

    Ruff's rule (PLW1514) does not know the types of most paths.
    """
    other = {"Image", "Pillow", "os", "tarfile", "DIRECT"}  # their `open` is of something else, or has bytes
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call) or {"encoding", None} & {word.arg for word in call.keywords}:
            continue
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        text = any(
            word.arg in {"text", "universal_newlines"} and getattr(word.value, "value", None) is True
            for word in call.keywords
        )
        if (
            (name == "open" and owner not in other and not binary(call))
            or (name == "fdopen" and not binary(call))
            or (name == "read_text" and not call.args)
            or (name == "write_text" and len(call.args) < 2)
            or name in {"FileHandler", "TextIOWrapper"}
            or (name in {"NamedTemporaryFile", "TemporaryFile"} and call.args + call.keywords and not binary(call))
            or text
        ):
            yield call.lineno


@pytest.mark.parametrize("scope", SCOPES)
def test_text_is_read_and_written_as_utf_8(scope: str) -> None:
    for path in (ROOT / scope).rglob("*.py"):
        assert [*calls_without_encoding(path)] == [], path
