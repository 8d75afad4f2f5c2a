"""The report of a run folder with damaged files: it shows what there is, and names what it leaves out and why."""

import json
import os
import re
import shutil
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
from markupsafe import Markup
from run_folders import row, write_run

from mmopd.errors import DataError, UserError
from mmopd.evaluate import BenchmarkScore, Results
from mmopd.report import html, run_files
from mmopd.report.heatmap import as_json
from mmopd.report.html import write_report
from mmopd.report.metrics import JsonLines, read_lines
from mmopd.runtime.run_folder import RunFolder

JSON = ("versions.json", "stages.json", "teachers.json", "results.json", "difficulty/difficulty.json")
LINES = ("metrics.jsonl", "samples.jsonl")
FILES = ("recipe.yaml", *JSON, *LINES)
# What the page shows of each file.
PART_OF = {
    "recipe.yaml": "teachers/<wbr>f.yaml",
    "versions.json": "torch <b>9.9</b>",
    "stages.json": 'id="time"',
    "teachers.json": "is another one from step 12 on",
    "results.json": 'id="results"',
    "difficulty/difficulty.json": '"source":"digits"',
    "metrics.jsonl": '"title":"Return"',
    "samples.jsonl": 'id="responses"',
}
Damage = Callable[[Path], object]


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


# Damages of any file: (what is done, what the page says of it). None of them leaves anything to read.
ANY: dict[str, tuple[Damage, str]] = {
    "garbage": (lambda path: path.write_bytes(bytes(range(128, 256)) * 8), "not UTF-8|cut short"),
    "zeros": (lambda path: path.write_bytes(bytes(4096)), "not JSON|not YAML|cut short"),
    "a folder": (as_folder, "not a regular file"),
    "a pipe": (as_pipe, "not a regular file"),
    "a link to itself": (as_link_to_itself, "not a regular file"),
    "UTF-16": (lambda path: path.write_bytes(path.read_text(encoding="utf-8").encode("utf-16")), "not UTF-8|not JSON"),
    "a list": (lambda path: path.write_text("[1, 2]\n", encoding="utf-8"), "not a JSON object|not a mapping"),
    "a number": (lambda path: path.write_text("7\n", encoding="utf-8"), "not a JSON object|not a mapping"),
    "null": (lambda path: path.write_text("null\n", encoding="utf-8"), "not a JSON object|not a mapping"),
    "a page": (
        lambda path: path.write_text("<html>quota exceeded</html>\n", encoding="utf-8"),
        "not JSON|not a mapping",
    ),
    "deep": (lambda path: path.write_text("[" * 2_000 + "\n", encoding="utf-8"), "not JSON|not YAML"),
}
EMPTY = dict.fromkeys(FILES, "empty") | {"recipe.yaml": "not a mapping"}


def change(edit: Callable[[dict], object]) -> Damage:  # type: ignore[type-arg]
    """Return a damage that edits the object in a JSON file, or the one in each line."""

    def damage(path: Path) -> None:
        lines = (
            path.read_text(encoding="utf-8").splitlines()
            if path.suffix == ".jsonl"
            else [path.read_text(encoding="utf-8")]
        )
        data = [json.loads(line) for line in lines]
        for one in data:
            edit(one)
        path.write_text("".join(json.dumps(one) + "\n" for one in data), encoding="utf-8")

    return damage


def in_results(**values: object) -> Damage:
    """Return a damage of the record of the distilled student."""
    return change(lambda data: data["rows"][2]["records"][0].update(values))


def in_source(**values: object) -> Damage:
    return change(lambda data: data["sources"]["digits"].update(values))


def lines(edit: Callable[[list[str]], list[str]]) -> Damage:
    return lambda path: path.write_text(
        "".join(edit(path.read_text(encoding="utf-8").splitlines(True))), encoding="utf-8"
    )


BIG = "9" * 5000  # Python refuses to read such an integer
# Damages of one file: (name, what is done, what the page says of it).
SPECIAL: list[tuple[str, Damage, str]] = [
    ("recipe.yaml", lambda p: p.write_text(p.read_text(encoding="utf-8") + "train: {", encoding="utf-8"), "not YAML"),
    (
        "recipe.yaml",
        lambda p: p.write_text("rollout: 3\ntrain: [1]\nalgorithm: x\nstudent: {model: {a: b}}\n", encoding="utf-8"),
        "",
    ),
    ("recipe.yaml", lambda p: p.write_text("train: {steps: " + BIG + "}\n", encoding="utf-8"), "not YAML"),
    ("recipe.yaml", lambda p: p.write_text("a: &a [x, x]\nb: &b [*a, *a]\nseed: *b\n", encoding="utf-8"), ""),
    ("recipe.yaml", lambda p: p.write_text("# \n" * 400_000, encoding="utf-8"), "at most 1 MiB are read"),
    ("recipe.yaml", lambda p: p.write_text('"a\\ud800": 1\n', encoding="utf-8"), ""),
    ("versions.json", change(lambda d: d.update(torch=None, numpy=["1"])), "torch: not a version"),
    ("versions.json", lambda p: p.write_text('{"mmopd": "\\ud800"}', encoding="utf-8"), ""),
    ("stages.json", change(lambda d: d.update(distil="long")), "distil: 'long' is no time"),
    ("stages.json", change(lambda d: d.update(distil=float("nan"))), "distil: nan is no time"),
    ("stages.json", change(lambda d: d.update(distil=-1)), "distil: -1 is no time"),
    ("stages.json", change(lambda d: d.update(distil=1e300)), "distil: 1e+300 is no time"),
    ("stages.json", change(lambda d: d.update(distil=True)), "distil: True is no time"),
    ("results.json", lambda p: p.write_text(p.read_text(encoding="utf-8")[:900], encoding="utf-8"), "not JSON"),
    ("results.json", change(lambda d: d.pop("rows")), "no list of rows"),
    ("results.json", change(lambda d: d.update(rows=[])), "no list of rows"),
    ("results.json", change(lambda d: d.update(rows=[7, None, {}])), "row 0: name None and kind None are no model"),
    ("results.json", change(lambda d: d["rows"][2].update(kind="best")), "kind 'best' are no model"),
    ("results.json", change(lambda d: d["rows"].append(d["rows"][0])), "base (base) is there twice"),
    ("results.json", change(lambda d: d["rows"][2].update(records="none")), "distilled: no list of records"),
    ("results.json", change(lambda d: d["rows"][2]["records"].append(None)), "distilled, 1: "),
    ("results.json", change(lambda d: d["rows"][2]["records"][0].pop("n")), "distilled, Digits: n: Field required"),
    ("results.json", in_results(score=float("nan")), "distilled, Digits: score nan is not between 0 and 100"),
    ("results.json", in_results(score=1e9), "distilled, Digits: score 1000000000.0 is not between"),
    ("results.json", in_results(score="high"), "distilled, Digits: score: "),
    ("results.json", in_results(stderr=float("inf")), "standard error inf is not between"),
    ("results.json", in_results(n=-3), "distilled, Digits: -3 questions"),
    ("results.json", in_results(status="maybe"), "distilled, Digits: status: "),
    ("results.json", in_results(settings=[1]), "distilled, Digits: settings: "),
    ("difficulty/difficulty.json", change(lambda d: d.update(sources=[1])), "sources: not a mapping"),
    ("difficulty/difficulty.json", change(lambda d: d["sources"].update(more=None)), "more: "),
    ("difficulty/difficulty.json", in_source(correct=[1]), "1 counts of right answers, 4 of attempts"),
    ("difficulty/difficulty.json", in_source(correct=[9] * 4), "more right answers than attempts"),
    ("difficulty/difficulty.json", in_source(attempts=[10**12] * 4), "a count that is none"),
    ("difficulty/difficulty.json", in_source(correct=[-1] * 4), "a count that is none"),
    ("difficulty/difficulty.json", in_source(weights=[float("nan")] * 4), "a weight is negative or not finite"),
    ("difficulty/difficulty.json", in_source(weights=[0.0] * 4), "a weight is negative or not finite"),
    ("difficulty/difficulty.json", in_source(correct=[], attempts=[], weights=[]), "0 counts"),
    ("metrics.jsonl", lambda p: p.write_bytes(p.read_bytes()[:-9]), "line 20: cut short"),
    ("metrics.jsonl", lines(lambda t: [*t[:5], t[5][:40] + "\n", *t[6:]]), "line 6: not JSON"),
    ("metrics.jsonl", lines(lambda t: [*t[:5], "\n", "[]\n", *t[5:]]), "line 6: empty"),
    ("metrics.jsonl", lines(lambda t: t[::-1]), "19 lines are not in the order of their steps"),
    ("metrics.jsonl", lines(lambda t: t + t[3:9]), "6 lines repeat a step"),
    ("metrics.jsonl", lines(lambda t: t[:3] + t[9:]), ""),
    ("metrics.jsonl", change(lambda d: d.update({"return": float("nan")})), "return: 20 values are no finite numbers"),
    ("metrics.jsonl", change(lambda d: d.update({"return": 1e308})), "return: 20 values are no finite numbers"),
    ("metrics.jsonl", change(lambda d: d.update({"return": "low"})), "return: 20 values are no finite numbers"),
    ("metrics.jsonl", change(lambda d: d.update({"return": True})), "return: 20 values are no finite numbers"),
    ("metrics.jsonl", change(lambda d: d.update({"return": None})), ""),
    ("metrics.jsonl", change(lambda d: d.pop("step")), "line 1: step None is no number of a step"),
    ("metrics.jsonl", change(lambda d: d.update(step=-1)), "line 1: step -1 is no number of a step"),
    ("metrics.jsonl", change(lambda d: d.update(step=0.5)), "line 1: step 0.5 is no number of a step"),
    ("metrics.jsonl", change(lambda d: d.update(step=10**30)), "line 1: step 1000"),
    ("metrics.jsonl", lines(lambda t: [*t, '{"step": ' + BIG + "}\n"]), "line 21: not JSON"),
    ("metrics.jsonl", lines(lambda t: [*t, '{"step": 20, "\\ud800": 1, "accuracy/\\udfff": 0.5}\n']), ""),
    ("metrics.jsonl", change(lambda d: d.update({f"accuracy/{i}": i / 100 for i in range(99)})), ""),
    ("samples.jsonl", lines(lambda t: [t[0], t[1][:-300]]), "line 2: cut short"),
    ("samples.jsonl", lines(lambda t: [*t, t[0][:300] + "\n"]), "line 3: not JSON"),
    ("samples.jsonl", change(lambda d: d.pop("tokens")), "line 1: tokens: Field required"),
    ("samples.jsonl", change(lambda d: d.update(tokens=["a"])), "line 1: 1 tokens, but 5, 5, 5 values"),
    ("samples.jsonl", change(lambda d: d.update(student=[float("nan")] * 5)), "line 1: a value of a token is not"),
    ("samples.jsonl", change(lambda d: d.update(outcome=7)), "outcome 7.0 cannot be"),
    ("samples.jsonl", change(lambda d: d.update(step="first")), "line 1: step: "),
    ("samples.jsonl", change(lambda d: d.update(images="none")), "line 1: images: "),
    ("samples.jsonl", change(lambda d: d.update(images=["none"])), "an image cannot be decoded"),
    ("samples.jsonl", change(lambda d: d.update(images=[d["images"][0][:80]])), "an image cannot be decoded"),
    ("samples.jsonl", change(lambda d: d.update(images=d["images"] * 30)), ""),
    ("samples.jsonl", change(lambda d: d.update(later_key=1)), ""),
    ("samples.jsonl", change(lambda d: d.update(prompt="\ud800\0", answer="\udfff", task="\udcff")), ""),
    ("samples.jsonl", change(lambda d: d.update(prompt="long " * 10**6, task="t" * 10**6, reason="r" * 10**6)), ""),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(autouse=True)
def without_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave 4.7 MB of every page out."""
    monkeypatch.setattr(html, "plotly", lambda: Markup("plotly"))


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def left_out(page: str) -> str:
    """Return what the page says that it leaves out."""
    found = re.search(r'id="left-out">(.*?)</div>', page, re.DOTALL)
    return unescape(re.sub("<.*?>", "", found[1])) if found else ""


def check(page: str, file: str, said: str) -> None:
    """Check that all other files are shown, and that the page says `said` of this one: a part, or one of several."""
    assert [name for name, part in PART_OF.items() if name != file and part not in page] == []
    if said:
        assert file in left_out(page)
        assert any(part in left_out(page) for part in said.split("|")), left_out(page)
    else:
        assert left_out(page) == ""
    assert len(page) < 3_000_000


def test_a_whole_run_leaves_nothing_out(run: Path) -> None:
    page = write_report(run).read_text(encoding="utf-8")
    assert [name for name, part in PART_OF.items() if part not in page] == []
    assert left_out(page) == ""
    assert "Not there" not in page


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ANY)
def test_a_file_that_is_no_longer_what_it_was_is_named(run: Path, file: str, kind: str) -> None:
    damage, said = ANY[kind]
    damage(run / file)
    page = write_report(run).read_text(encoding="utf-8")
    assert PART_OF[file] not in page or file == "recipe.yaml"
    check(page, file, said)


@pytest.mark.parametrize("file", FILES)
def test_an_empty_file_and_a_missing_one_are_named(run: Path, file: str) -> None:
    (run / file).write_bytes(b"")
    check(write_report(run).read_text(encoding="utf-8"), file, EMPTY[file])
    (run / file).unlink()
    page = write_report(run).read_text(encoding="utf-8")
    check(page, file, "")
    assert f"Not there, or not yet: {file}." in page


@pytest.mark.parametrize(("file", "damage", "said"), SPECIAL, ids=[f"{i}-{s[0]}" for i, s in enumerate(SPECIAL)])
def test_what_is_damaged_in_a_file_is_named_and_the_rest_of_it_is_shown(
    run: Path, file: str, damage: Damage, said: str
) -> None:
    damage(run / file)
    check(write_report(run).read_text(encoding="utf-8"), file, said)


def test_many_damages_are_counted(run: Path) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("no\n" * 5000)
    said = left_out(write_report(run).read_text(encoding="utf-8"))
    assert said.count("not JSON") == run_files.NAMED
    assert "metrics.jsonl: 4,992 more" in said


def test_a_huge_file_is_read_in_part(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_files, "FILE_LIMIT", 1000)
    page = write_report(run).read_text(encoding="utf-8")
    assert re.search(r"metrics.jsonl: \S+ MiB: only one line of \d+ is read", left_out(page))
    assert re.search(r"results.json: \S+ MiB: at most 0 MiB are read", left_out(page))
    assert '"title":"Return"' in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert (data["curves"][0]["x"][0], data["curves"][0]["x"][-1]) == (0, 19)


def test_a_line_without_an_end_is_skipped(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_files, "LINE_LIMIT", 4000)
    text = (run / "samples.jsonl").read_text(encoding="utf-8")
    (run / "samples.jsonl").write_text("x" * 20_000 + "\n" + text, encoding="utf-8")
    page = write_report(run).read_text(encoding="utf-8")
    check(page, "samples.jsonl", "line 1: longer than 0 MiB")
    assert page.count("<article") == 2


def test_a_page_is_bounded_however_long_the_responses_are(run: Path) -> None:
    """40 responses of 5,000 tokens make a page of at most 20,000 tokens."""
    T = 5_000
    lists = {name: [-0.1] * T for name in ("student", "teacher", "advantage")}
    responses = [as_json(row(step, outcome=step % 2, tokens=["ab"] * T, **lists)) for step in range(40)]
    (run / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in responses), encoding="utf-8")
    page = write_report(run).read_text(encoding="utf-8")
    assert 10_000 < page.count("data-n=") <= 20_000
    assert page.count("4,000 tokens are not on this page") == page.count("<article") == 20
    assert "20 of 40 recorded responses are on this page" in page
    assert left_out(page) == ""


def test_a_page_that_cannot_be_written_is_an_error_of_the_user(run: Path) -> None:
    (run / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report\.html: the report cannot be written"):
        write_report(run)


# What a resume, an export and a comparison read of a run folder cannot be left out: the message names the file.


@pytest.mark.parametrize("damaged", ['{"step": 0', "[1]", "{}", '{"step": "one"}', "[" * 100_000, "\0" * 9])
def test_a_resume_names_the_damaged_line(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 0}}\n{damaged}\n{{"step": 2}}\n', encoding="utf-8")
    for use in (read_lines, lambda path: JsonLines(path, 5)):
        with pytest.raises(DataError, match=r"metrics\.jsonl: line 2 is damaged: .*; delete this line"):
            use(path)
    JsonLines(path, 0).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("damaged", ["", "7", "[1]", "no", '{"rows": [{}]}', "[" * 100_000])
def test_damaged_versions_results_and_records_are_errors_that_name_the_file(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "versions.json"
    path.write_text(damaged, encoding="utf-8")
    uses = {Results.read: "measures again", BenchmarkScore.read: "delete it to measure again"}
    for use, way_out in uses.items():
        with pytest.raises(DataError, match=rf"versions\.json: damaged .*{way_out}"):
            use(path)
    if "rows" not in damaged:
        with pytest.raises(DataError, match=r"versions\.json: damaged .*; delete it"):
            RunFolder(tmp_path).kernels()
