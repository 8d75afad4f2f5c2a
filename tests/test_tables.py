"""Tables of every kind as people have them: right rows become rows, and damaged ones are counted by their cause."""

import codecs
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmopd.errors import DataError
from mmopd.prompts import tables
from mmopd.prompts.prepare import Count, prepare
from mmopd.prompts.reading import SourceSettings, read
from mmopd.prompts.shards import Shards

GENERIC = Path(__file__).parents[1] / "data" / "generic.py"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(file: str, *settings: str) -> tuple[Shards, Count]:
    return prepare(GENERIC, Path("out"), [f"data={file}", "task=additions", *settings], max_bad=1.0)


def asked(shards: Shards) -> list[tuple[str, str]]:
    return [(row.messages[0]["content"][0]["text"], row.answer) for row in shards]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b'question,answer\n"1+1=",2\n'),
        ("a.CSV", b"answer,question\n2,1+1=\n"),
        ("a.csv", codecs.BOM_UTF8 + b"question;answer\r\n1+1=;2\r\n"),
        ("a.csv", b"question|answer\n1+1=|2\n"),
        ("a.csv", b"question\tanswer\n1+1=\t2\n"),
        ("a.csv", b" question , answer\n1+1=, 2\n"),
        ("a.csv", b',question,answer\n0,"1+1=", "2"\n'),
        ("a.csv", b"question,answer\r1+1=,2\r"),
        ("a.csv", b"\n\nquestion,answer\n\n1+1=,2\n,\n\n"),
        ("a.csv", b'id;"one, two, or three";question;answer\n1;x;1+1=;2\n'),
        ("a.csv", b"question,answer,note\n1+1=,2\n"),
        ("a.tsv", b"question\tanswer\n1+1=\t2\n"),
        ("a.csv", codecs.BOM_UTF16_LE + "question;answer\r\n1+1=;2\r\n".encode("utf-16-le")),
        ("a.tsv", codecs.BOM_UTF16_BE + "question\tanswer\r\n1+1=\t2\r\n".encode("utf-16-be")),
    ],
)
def test_the_delimiter_and_the_encoding_are_found(name: str, content: bytes) -> None:
    Path(name).write_bytes(content)
    assert asked(made(name)[0]) == [("1+1=", "2")]


def test_quoted_texts_keep_their_lines_delimiters_and_quotes() -> None:
    Path("a.csv").write_bytes(b'question,answer\r\n"What is ""1+1"",\r\nor 2,000?",2\r\n"caf\xc3\xa9 1+2=",3\r\n')
    assert asked(made("a.csv")[0]) == [('What is "1+1",\r\nor 2,000?', "2"), ("café 1+2=", "3")]


def test_damaged_rows_of_a_csv_are_counted_by_cause_and_the_others_are_kept() -> None:
    lines = [
        b"question,answer",
        b"1+1=,2",
        b"1,000+1=,1001",  # a text with a comma, not quoted
        b"1+2=",  # cut
        b"caf\xe9 1+2=,3",  # Latin-1
        b",4",
        b'"1+3"=,4',  # a quote in the middle
        b"1+4=,5",
        b"1+5=,five",
        b'"1+6=,7',  # a quote that is closed by that of the next line
        b'"1+7=",8',
        b"1+8=,9",
    ]
    Path("a.csv").write_bytes(b"\n".join(lines) + b"\n")
    shards, count = made("a.csv")
    assert asked(shards) == [("1+1=", "2"), ("1+4=", "5"), ("1+8=", "9")]
    assert count.left_out == {
        "too many columns": 1,
        "no answer": 1,
        "not UTF-8": 1,
        "no question": 1,
        "broken quotes": 3,
        "key judges nothing": 1,
    }
    assert (
        "line 3: 3 columns, and the first line names 2; quote texts that have ','" in count.shown["too many columns"][0]
    )
    assert "line 5: save the file as UTF-8" in count.shown["not UTF-8"][0]
    assert "lines 10 to 11: ',' expected after '\"'" in count.shown["broken quotes"][1]


def test_every_line_after_a_quote_that_is_never_closed_counts_as_bad() -> None:
    rows = [f"{i}+1=,{i + 1}" for i in range(20)]
    rows[10] = '"' + rows[10]
    Path("a.csv").write_text("\n".join(["question,answer", *rows]), encoding="utf-8")
    shards, count = made("a.csv")
    assert (len(shards), count.left_out) == (10, {"broken quotes": 10})
    assert "lines 12 to 21: unexpected end of data" in count.shown["broken quotes"][0]


def test_a_row_without_an_end_is_not_read_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ROW", 1000)
    long = "9" * 5000
    quoted = "x,y\n" * 300
    Path("a.csv").write_text(f'question,answer\n{long},1\n1+1=,2\n"{quoted}\n1+2=,3\n', encoding="utf-8")
    shards, count = made("a.csv")
    assert asked(shards)[0] == ("1+1=", "2")
    assert "a row of more than 1,000 characters" in count.shown["broken quotes"][0]
    Path("out").rename("csv")
    Path("a.jsonl").write_text(
        json.dumps({"question": long, "answer": "1"}) + '\n{"question": "1+1=", "answer": "2"}\n', encoding="utf-8"
    )
    shards, count = made("a.jsonl")
    assert (asked(shards), count.left_out) == ([("1+1=", "2")], {"row too long": 1})
    Path("a.json").write_text('[{"question": "1+1=", "answer": "' + "2" * 3_000_000, encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json: not valid JSON"):
        list(read(SourceSettings(data="a.json", task="additions")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.csv: it is empty; its first line must name the columns"),
        (b"\n \n", "a.csv: it is empty"),
        (b"question,answer,answer\n1+1=,2,3\n", "the column 'answer' stands twice in its first line"),
        (b'"question,answer\n1+1=,2\n', "the line with the names of its columns cannot be read"),
        (b"qu\xe9stion,answer\n1+1=,2\n", "the line with the names of its columns is not UTF-8; save the file"),
        (b"1+1=,2\n1+2=,3\n", r"the column 'answer' is missing or empty; there is 1\+1=, 2"),
        (codecs.BOM_UTF16_LE + "question,answer\n1+1=,2\n".encode("utf-16-le")[:-1], "is not utf-16"),
    ],
)
def test_a_csv_that_cannot_be_a_table_is_refused_by_name(content: bytes, message: str) -> None:
    Path("a.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        made("a.csv")


SUMS = [{"question": f"{i}+1=", "answer": i + 1} for i in range(5)]


def test_a_list_is_read_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [*SUMS, {"question": "é" * 100 + "1+1=", "answer": 2, "more": [{"a": "]"}, -1.5e3, None, True]}]
    monkeypatch.setattr(tables, "PIECE", 7)
    for text in (json.dumps(rows, indent=2), json.dumps(rows, ensure_ascii=False), "\ufeff [" + json.dumps(rows)[1:]):
        Path("a.json").write_text(text, encoding="utf-8")
        assert list(read(SourceSettings(data="a.json", task="additions"))) == rows
    Path("a.json").write_text("[1, 23, 456]", encoding="utf-8")
    assert list(read(SourceSettings(data="a.json", task="additions"))) == [1, 23, 456]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "not valid JSON"),
        ('[{"a": 1}', r"not valid JSON \(expected ','"),
        ('[{"a": 1}, ', "not valid JSON"),
        ('[{"a": 1} {"a": 2}]', r"not valid JSON \(expected ',' at character 10\)"),
        ('[{"a": 1}] x', "not valid JSON"),
        ('[{"a": 1}, {"a": ]', "not valid JSON"),
        ("", "not valid JSON"),
        ("5", "it must be a list of examples"),
        ('{"rows": []}', "it must be a list of examples"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_a_damaged_list_is_refused_by_name(text: str, message: str) -> None:
    Path("a.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        list(read(SourceSettings(data="a.json", task="additions")))


def test_an_object_that_is_too_large_is_refused_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_OBJECT", 100)
    Path("a.json").write_text(json.dumps({"data": SUMS}), encoding="utf-8")
    with pytest.raises(DataError, match=r"`jq -c '\.data\[\]' a\.json > a\.jsonl`"):
        read(SourceSettings(data="a.json", task="additions"))


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_damaged_rows_of_json_are_counted_by_cause(form: str) -> None:
    odd: list[Any] = [5, None, "text", [], {}, {"question": "1+1="}, {"question": ["a"], "answer": 2}]
    rows = [*SUMS[:3], *odd, *SUMS[3:]]
    lines = "\n".join(map(json.dumps, rows)) if form == "jsonl" else json.dumps(rows)
    Path(f"a.{form}").write_text(lines, encoding="utf-8")
    if form == "jsonl":
        with Path("a.jsonl").open("ab") as file:
            file.write(b"\n{\n\xff\xff\n" + b"[" * 100_000 + b'\n{"question": "caf\xe9", "answer": 1}\n\n')
    shards, count = made(f"a.{form}")
    assert [answer for _, answer in asked(shards)] == ["1", "2", "3", "4", "5"]
    damaged = {"not JSON": 2, "not UTF-8": 2} if form == "jsonl" else {}
    assert count.left_out == {"no object": 4, "no answer": 2, "no question": 1, **damaged}


def test_large_rows_of_parquet_are_read_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": f"{i}+1=" + " " * 10_000, "answer": str(i + 1)} for i in range(50)]
    pq.write_table(pa.Table.from_pylist(rows), "a.parquet", compression="none", use_dictionary=False)
    seen = list[int]()
    iterate = pq.ParquetFile.iter_batches
    monkeypatch.setattr(tables, "BATCH_BYTES", 30_000)
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda file, n, **rest: seen.append(n) or iterate(file, n, **rest)
    )
    assert len(made("a.parquet")[0]) == 50
    assert seen == [2]


def test_damaged_rows_of_parquet_are_counted_by_cause() -> None:
    rows = [*({**row, "answer": str(row["answer"])} for row in SUMS), {"question": None, "answer": "1"}]
    rows += [
        {"question": "1+1=", "answer": None},
        {"question": "1+1=", "answer": "two"},
        {"question": "", "answer": "2"},
    ]
    rows += [{"question": "x" * 1_000_001, "answer": "1"}]
    table = pa.Table.from_pylist(rows)
    odd = pa.table({"question": pa.array([b"\xff+1=", b"1+1="]).view(pa.string()), "answer": ["1", "2"]})
    dates = pa.array([0] * len(table) + [0, 1 << 62], pa.timestamp("ms"))
    pq.write_table(pa.concat_tables([table, odd]).append_column("date", dates), "a.parquet")
    shards, count = made("a.parquet", "extra=[date]")
    assert len(shards) == 5
    assert count.left_out == {
        "no question": 2,
        "no answer": 1,
        "key judges nothing": 1,
        "text too long": 1,
        "not UTF-8": 1,
        "bad value": 1,
    }
