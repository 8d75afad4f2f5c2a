"""`mmopd prepare`: the same bytes however often it is stopped and with any number of workers; every lost row is
counted.
"""

import fcntl
import json
import os
import re
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmopd.cli import app
from mmopd.demo import world
from mmopd.errors import UserError
from mmopd.prompts import Shards, TokenCounter
from mmopd.prompts.prepare import prepare
from mmopd.prompts.tokens import hash_processor

GENERIC = Path("data") / "generic.py"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty workspace with a file of sums."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"question": f"What is {i}+1?", "answer": i + 1, "id": f"sum-{i}"}) for i in range(300)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def settings(**changes: object) -> list[str]:
    return [f"{key}={value}" for key, value in {"data": "sums.jsonl", "task": "additions", **changes}.items()]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write(out: Path, **changes: object) -> Shards:
    return prepare(ROOT / GENERIC, out, settings(), max_rows=70, **changes)[0]  # type: ignore[arg-type]


def test_rows_are_those_of_the_file_in_its_order(here: Path) -> None:
    shards, count = prepare(ROOT / GENERIC, here / "out", settings(number="id"), max_rows=70)
    assert [row.answer for row in shards] == [str(i + 1) for i in range(300)]
    assert shards[7].messages[0]["content"] == [{"type": "text", "text": "What is 7+1?"}]
    assert (count.examples, count.rows, count.shards, count.left_out) == (300, 300, 5, {})
    assert json.loads((here / "out/prepare.json").read_text(encoding="utf-8"))["rows"] == 300
    assert [path.name for path in here.iterdir() if path.name.startswith(".")] == []


def test_any_number_of_workers_writes_the_same_bytes(here: Path) -> None:
    write(here / "one")
    write(here / "two", workers=2)
    assert files(here / "one") == files(here / "two")


def converter(here: Path, name: str, first: str) -> Path:
    """Return the generic converter with code inserted before its conversion."""
    code = (ROOT / GENERIC).read_text(encoding="utf-8")
    assert code.count("    value = ") == 1
    (here / name).write_text(code.replace("    value = ", f"    {first}\n    value = "), encoding="utf-8")
    return here / name


def test_a_call_that_was_killed_is_continued_to_the_same_bytes(here: Path) -> None:
    bad = "if example['answer'] in {3, 90, 91, 200}: raise ValueError('bad one')"
    slow = converter(here, "slow.py", f"{bad}\n    __import__('time').sleep(0.002)")
    prepare(slow, here / "whole", settings(), max_bad=0.1, max_rows=40)
    context = get_context("forkserver")
    context.set_forkserver_preload(["mmopd.prompts.work"])
    for shards in (2, 5):
        child = context.Process(
            target=prepare, args=(slow, here / "out", settings()), kwargs={"max_bad": 0.1, "max_rows": 40}
        )
        child.start()
        while child.is_alive() and len(list(here.glob(".out.partial/*.index.safetensors"))) < shards:
            time.sleep(0.002)
        time.sleep(0.03)  # so that the next shard has begun
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    assert not (here / "out").exists()
    prepare(slow, here / "out", settings(), max_bad=0.1, max_rows=40, workers=2)
    assert files(here / "out") == files(here / "whole")
    assert json.loads((here / "out/prepare.json").read_text(encoding="utf-8"))["left_out"] == {"ValueError": 4}


def test_what_was_finished_is_not_converted_again(here: Path) -> None:
    log = "with open('log', 'a') as log: log.write(f\"{example['answer']}\\n\")"
    stops = converter(
        here,
        "stops.py",
        f"{log}\n    if example['answer'] == 150 and not __import__('os').path.exists('go'): raise KeyboardInterrupt",
    )
    with pytest.raises(KeyboardInterrupt):
        prepare(stops, here / "out", settings(), max_rows=70)
    (here / "log").rename(here / "go")
    prepare(stops, here / "out", settings(), max_rows=70)
    assert [int(line) for line in (here / "log").read_text(encoding="utf-8").split()] == list(range(141, 301))
    assert len(Shards(here / "out")) == 300


def test_another_setting_starts_again(here: Path) -> None:
    stops = converter(here, "stops.py", "if example['answer'] == 150 and settings.ask is None: raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        prepare(stops, here / "out", settings(), max_rows=70)
    shards, _ = prepare(stops, here / "out", settings(ask="Why?"), max_rows=70)
    assert {row.messages[0]["content"][0]["text"] for row in shards} == {"Why?"}
    assert len(shards) == 300


def test_a_worker_that_dies_is_an_error_that_says_where(here: Path) -> None:
    dies = converter(here, "dies.py", "if example['answer'] == 200: __import__('os')._exit(9)")
    with pytest.raises(UserError, match=r"a worker process died while converting examples from number \d+ on"):
        prepare(dies, here / "out", settings(), workers=2)


def test_two_calls_for_one_folder_do_not_mix(here: Path) -> None:
    partial = here / ".out.partial"
    partial.mkdir()
    held = os.open(partial, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(UserError, match=r"\.out\.partial: another call is writing this source"):
        write(here / "out")
    os.close(held)
    write(here / "out")


def test_tokens_are_counted_for_a_student_and_limit_a_source(here: Path) -> None:
    world.build_processor().save_pretrained(here / "student")
    data = world.additions("train", 20, 0)
    lines = [
        json.dumps({"question": row["messages"][0]["content"][0]["text"] * (i % 3 + 1), "answer": row["answer"]})
        for i, row in enumerate(data)
    ]
    (here / "sums.jsonl").write_text("\n".join(lines), encoding="utf-8")
    shards, _ = prepare(ROOT / GENERIC, here / "out", settings(), processor=here / "student")
    counter = TokenCounter(here / "student")
    lengths = [sum(counter(row)) for row in shards]
    assert [shards.tokens(i) for i in range(20)] == lengths
    assert shards.processor == hash_processor(here / "student")
    assert shards.totals().text == sum(lengths)
    limit = sorted(lengths)[9]
    short = shards.filtered(limit)
    assert [row.key for row in short] == [f"out/{i}" for i, n in enumerate(lengths) if n <= limit]
    assert short.left_out == {f"over {limit} tokens": sum(n > limit for n in lengths)}
    assert short.fingerprint != shards.fingerprint == shards.filtered(10**6).fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "adition"}, r"no task 'adition' in modalities/; did you mean 'additions'"),
        ({"colour": 1}, r"generic\.py: unknown key 'colour'"),
        ({"limit": 0}, r"generic\.py: limit: "),
        (
            {"question": "query"},
            r"none of 300 examples became a row.*\n  300 x no query\n"
            r"    example 0: the column 'query' is missing.*there is question, answer, id",
        ),
    ],
)
def test_what_is_wrong_is_named(here: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(ROOT / GENERIC, here / "out", settings(**changes))
    assert not (here / "out").exists()


def test_a_file_that_is_no_converter_and_a_folder_in_use_are_refused(here: Path) -> None:
    (here / "no.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"no\.py: not a converter, it has no `Settings`"):
        prepare(here / "no.py", here / "out", settings())
    write(here / "out")
    with pytest.raises(UserError, match="already there"):
        write(here / "out")


def test_the_command_prints_totals(here: Path) -> None:
    (here / "sums.jsonl").write_text(
        '{"question": "1+1?", "answer": "2"}\n{"question": "1+2?"}\nnot json\n', encoding="utf-8"
    )
    arguments = [
        "prepare",
        str(GENERIC),
        "out",
        "--workers",
        "1",
        *(part for one in settings() for part in ("--set", one)),
    ]
    with pytest.raises(UserError, match=r"2 of 3 examples \(66\.7%\) are bad, more than --max-bad 1\.0%"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    done = CliRunner().invoke(app, [*arguments, "--max-bad", "0.7"], catch_exceptions=False)
    flat = re.sub(r"[\s│]+", " ", done.output)
    assert "out: 1 rows, tokens not counted, 0 images" in flat
    assert "of 3 examples: 1 rows, 0 not wanted, 2 bad" in flat
    assert "1 no answer example 1: the column 'answer' is missing or empty; there is question" in flat
    assert "1 not JSON example 2:" in flat
