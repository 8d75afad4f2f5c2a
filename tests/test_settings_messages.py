"""What a user is told of a file that YAML reads in an unexpected way, of the wrong kind of file, and of an override."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmopd import catalog, plain_yaml, settings_file
from mmopd.cli import app
from mmopd.config import Comparison, Fleet, Mixture, Recipe
from mmopd.errors import ConfigError, UserError
from mmopd.evaluate.tasks import read_task
from mmopd.plain_yaml import YamlError, parse
from mmopd.serving import endpoint

RECIPE = "student: {model: m}\nfleet: teachers/demo.yaml\nmixture: data/demo.yaml\n"
ENDPOINTS = json.dumps([{"name": "a.0", "url": "http://h:1", "model": "a", "api_key": "", "role": "teacher"}])
BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' stands in line 1 already: remove one of them"),
        ("{a: {b: 1, b: 2}}", "line 1: the key 'b' stands in line 1 already"),
        ("{" * 2000, "line 1: more than 32 lists or mappings inside each other"),
        ("[" * 200_000 + "]" * 200_000, "line 1: more than 32 lists"),  # libyaml's composer ends the process
        ("- " * 100_000 + "x", "line 1: more than 32 lists"),
        (BOMB, "line 5: aliases make more than 20,000 values of this"),
        ("a: &a [*a]", "line 1: this contains itself by an alias: write it out"),
        ("a: &a {<<: *a}", "line 1: this contains itself by an alias"),
        ("x: 1\na: 0100", "line 2: `0100` means 64 in YAML: write 64, or put quotes around a text"),
        ("a: 1:30", "line 1: `1:30` means 90 in YAML"),
        (f"a: {'9' * 5000}", "is too large: it may have 64 bits"),
        (f"a: 0x{'f' * 5000}", "is too large: it may have 64 bits"),
        ("a: 18446744073709551616", "is too large: it may have 64 bits"),
        ("a: !!int b", "line 1: `b` is no int: put quotes around a text"),
        ("a: !!bool b", "line 1: `b` is no bool"),
        ("a: !!timestamp b", "line 1: the tag !!timestamp has no meaning here"),
        ("a: !!binary b", "line 1: the tag !!binary has no meaning here"),
        ("a: !!set {b}", "line 1: the tag !!set has no meaning here"),
        (
            "a: !!python/object/apply:os.system [x]",
            "the tag !!python/object/apply:os.system has no meaning here",
        ),
        ('a: "b\\0"', "line 1: a text with a NUL character: remove it"),
        ("a: 1\nb: c\0", "line 2: a control character: remove it"),
        ("a:\n\tb: 1", "indent with spaces, not with tabs"),
        ("yes: 1", "line 1: YAML reads the key `yes` as true or false: put quotes around it"),
        ("~: 1", "line 1: YAML reads the key `~` as nothing"),
        ("? [a]\n: 1", "line 1: a key is a text, not a list or a mapping"),
        ("a: 1\n---\nb: 1", "remove the line `---` in the middle: a file is one document"),
        ("a: *b", "an alias such as `*name` needs its `&name` above it"),
        ("<<: 3", "`<<` takes an alias of a mapping"),
        ("a: @b", "put quotes around a text that begins with this character"),
        ("a: b: c", "line 1, column 5: not valid YAML: mapping values are not allowed in this context: put quotes"),
        ("a: [b", "look here and in the line before for a bracket or quote that is not closed"),
        ('a: "\\d"', "in double quotes a backslash begins an escape: use single quotes"),
        ("\ud800", r"half a character, '\ud800'"),
    ],
)
def test_what_yaml_cannot_read_or_reads_in_another_way_than_a_person_is_refused(text: str, message: str) -> None:
    with pytest.raises(YamlError) as error:
        parse(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_plain_values_merged_mappings_and_dates_are_read() -> None:
    text = "a: &a {x: 1, y: 2024-13-45}\nb: {<<: *a, x: 1.5e-3}\nc: [~, on, 'no', -3, .inf, 0x10, =, 1e-6]\n1: ''"
    a = {"x": 1, "y": "2024-13-45"}
    expected = {"a": a, "b": {**a, "x": 1.5e-3}, "c": [None, True, "no", -3, float("inf"), 16, "=", "1e-6"], 1: ""}
    assert parse(text) == expected
    assert parse("") is parse("# nothing") is None


def test_without_libyaml_the_same_files_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_yaml, "Base", plain_yaml.yaml.SafeLoader)

    class Loader(plain_yaml.yaml.SafeLoader):
        tags = plain_yaml.PLAIN

    assert parse("a: [1, {b: c}]", Loader) == {"a": [1, {"b": "c"}]}  # type: ignore[arg-type]
    with pytest.raises(YamlError, match="line 1: a control character"):
        parse("a: \0", Loader)  # type: ignore[arg-type]
    with pytest.raises(YamlError, match="line 1: more than 32 lists"):
        parse("[" * 40, Loader)  # type: ignore[arg-type]


KINDS = {
    "recipes/demo.yaml": ("a recipe", "`mmopd train recipes/demo.yaml` runs it"),
    "teachers/demo.yaml": ("a fleet of teachers", "`mmopd serve teachers/demo.yaml` serves it"),
    "data/demo.yaml": ("a mixture", "`mixture` of a recipe names it"),
    "eval/demo.yaml": ("a suite of benchmarks", "`mmopd eval eval/demo.yaml MODEL` runs it"),
    "recipes/compare_demo.yaml": ("a comparison", "`mmopd compare recipes/compare_demo.yaml` runs it"),
    "eval/tasks/demo_digit_sum.yaml": ("a task of lmms-eval", "a benchmark of a suite names it under `task`"),
    "endpoints.json": ("a file of endpoints", "`mmopd train RECIPE --endpoints endpoints.json` takes it"),
}
SHOWN = {*KINDS} - {"eval/tasks/demo_digit_sum.yaml", "endpoints.json"}  # by `mmopd show`
TAKES = {
    ("train",): "recipes/demo.yaml",
    ("show",): "recipes/demo.yaml",
    ("plan",): "recipes/demo.yaml",
    ("doctor",): "recipes/demo.yaml",
    ("difficulty",): "recipes/demo.yaml",
    ("eval", "eval/demo.yaml", "model", "--recipe"): "recipes/demo.yaml",
    ("serve",): "teachers/demo.yaml",
    ("compare",): "recipes/compare_demo.yaml",
}


@pytest.mark.parametrize("command", TAKES, ids=" ".join)
def test_a_command_that_gets_another_kind_of_file_says_what_it_is_and_what_takes_it(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog.init(tmp_path)
    (tmp_path / "endpoints.json").write_text(ENDPOINTS, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for name, (what, use) in KINDS.items():
        if name == TAKES[command] or (command == ("show",) and name in SHOWN):
            continue
        with pytest.raises(ConfigError) as error:
            CliRunner().invoke(app, [*command, name], catch_exceptions=False)
        said = str(error.value).replace(f"{tmp_path}/", "")
        assert said.startswith(f"{name}: this is {what}")
        assert use in said
        assert "\n" not in said


def test_a_folder_is_no_file_and_that_of_a_run_has_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match=r"^runs: this is a folder; give a file$"):
        catalog.find("runs")
    (tmp_path / "runs" / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"`runs/recipe\.yaml` is the recipe of this run"):
        catalog.find("runs")
    for name in ("x" * 5000, "x/" * 3000, "a\0b", "x.**", "data/[.yaml", ""):
        with pytest.raises(ConfigError):
            catalog.find(name)


@pytest.mark.parametrize(
    ("cls", "text", "message"),
    [
        (Recipe, "student: 3\nmixture: m", "student: expected keys and values, found 3"),
        (Recipe, "student: {model: [m]}\nmixture: m", "student.model: expected a path, found a list"),
        (Recipe, "student: {model: m}\nmixture: 3", "mixture: expected a path, found 3: put quotes around it"),
        (Recipe, "student: {model: m}", "mixture: missing (File of data/ with the sources of prompts)"),
        (Recipe, RECIPE + "train: {steps: x}", "train.steps: expected a whole number, found 'x'"),
        (Recipe, RECIPE + "train: {steps: 1.5}", "train.steps: expected a whole number, found 1.5"),
        (Recipe, RECIPE + "train: {steps: yes}", "train: steps: expected a number, found true"),
        (Recipe, RECIPE + "train: {minutes: on}", "train: minutes: expected a number, found true"),
        (Recipe, RECIPE + "steps: 3", "unknown key 'steps'; `steps` belongs under `train`: look at its indentation"),
        (Recipe, RECIPE + "rollout: {mixture: 3}", "`mixture` belongs to the top of the file: look at its"),
        (Recipe, RECIPE + "train: {lr: .inf}", "train.lr: has to be a finite number, found inf"),
        (Recipe, RECIPE + "train: {offload: 3}", "train.offload: expected true or false, found 3"),
        (Recipe, RECIPE + "train: {freeze: vision}", "train.freeze: expected a list, found 'vision': put brackets"),
        (Recipe, RECIPE + "train: {lora: {parts: []}}", "train.lora.parts: expected at least 1 values, found 0"),
        (Recipe, RECIPE + "train: {STEPS: 3}", "unknown key 'train.STEPS'; did you mean 'steps'?"),
        (Recipe, RECIPE + "algorithm: {objective: {kind: [opd]}}", "`kind` is a name, not a list; there is opd"),
        (Mixture, "sources: {a: {shards: 3, task: t}}", "sources.a.shards: expected a text or a path, found 3: put"),
        (Mixture, "sources: {1: {shards: s, task: t}}", "sources.1: this key is no text: put quotes around it"),
        (
            Fleet,
            "teachers: {a: {model: m}}\nroutes: [{teacher: {a: 0}}]",
            "routes.0.teacher.a: has to be greater",
        ),
        (
            Fleet,
            "teachers: {a: {model: m}}\nroutes: [{teacher: []}]",
            "expected a text or keys and values, found",
        ),
        (Fleet, "teachers: {a: {view: x}}\nroutes: []", "teachers.a: a teacher has either `model`"),
        (Comparison, "variants: {a: {}}\ntables: {}", "recipe: missing (Recipe that all variants start from)"),
        (Recipe, RECIPE + "train: {ranks: 4611686018427387904}", "train.ranks: has to be less than or equal to 10000"),
        (Recipe, "- a", "expected keys and values, one `key: value` a line; found a list"),
        (Recipe, "", "expected keys and values, one `key: value` a line; the file is empty"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_what_is_expected(
    cls: type[settings_file.File], text: str, message: str, tmp_path: Path
) -> None:
    (path := tmp_path / "r.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        settings_file.read(cls, path)
    assert message in str(error.value)
    assert str(error.value).count(str(path)) == 1


def test_many_mistakes_are_cut_to_a_few_lines(tmp_path: Path) -> None:
    (path := tmp_path / "r.yaml").write_text(RECIPE + "".join(f"x{i}: 1\n" for i in range(30)), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"22 more of this kind$") as error:
        settings_file.read(Recipe, path)
    assert len(str(error.value).splitlines()) == 9


def test_what_is_no_text_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="bytes are too many for a file of settings"):
        catalog.load_recipe(tmp_path / "large")
    (tmp_path / "utf16.yaml").write_text(RECIPE, encoding="utf-16")
    with pytest.raises(ConfigError, match=r"utf16\.yaml: line 1 is not UTF-8"):
        catalog.load_recipe(tmp_path / "utf16.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=0", "train.steps: has to be greater than or equal to 1, found 0 (set by 'train.steps=0')"),
        ("rollout.group=65", "rollout.group is 65, and student.engine.max_num_seqs is 64"),
        ("train.freeze=[vision", "'train.freeze=[vision': the value of 'train.freeze': line"),
        ("seed={" + "{" * 2000, "the value of 'seed': line 1: more than 32 lists or mappings"),
        ("seed=\udcff", r"the value of 'seed': half a character, '\udcff'"),
        ("seed.x=1", "'seed' is 0 and has no keys: set it as a whole"),
        ("=1", "'=1': an override is written key=value, such as train.steps=20"),
        ("train.=1", "'train.=1': an override is written key=value"),
    ],
)
def test_an_override_that_does_not_fit_is_named(override: str, message: str, tmp_path: Path) -> None:
    (path := tmp_path / "r.yaml").write_text(RECIPE + "seed: 0", encoding="utf-8")
    with pytest.raises(UserError) as error:
        catalog.load_recipe(path, overrides=[override])
    assert message in str(error.value)
    assert override[:20].encode("unicode_escape").decode() in str(error.value)


def test_an_override_changes_only_the_place_that_it_names(tmp_path: Path) -> None:
    text = "teachers: {a: {model: m, engine: &tiny {port: 2000}}, b: {model: m, engine: *tiny}}\nroutes: []"
    (path := tmp_path / "f.yaml").write_text(text, encoding="utf-8")
    fleet = settings_file.read(Fleet, path, ["teachers.a.engine.port=3000"])
    assert [teacher.engine.port for teacher in fleet.teachers.values()] == [3000, 2000]


def test_show_says_which_of_its_arguments_a_file_does_not_take() -> None:
    with pytest.raises(UserError, match="this is a mixture, which takes no key=value"):
        CliRunner().invoke(app, ["show", "data/demo.yaml", "adapt=0.5"], catch_exceptions=False)
    with pytest.raises(UserError, match="this is no mixture; --prompts is for a mixture"):
        CliRunner().invoke(app, ["show", "recipes/demo.yaml", "--prompts", "9"], catch_exceptions=False)


def test_brackets_in_names_are_shown_as_they_are() -> None:
    done = CliRunner().invoke(app, ["show", "recipes/demo.yaml", "student.model='models/[/red]x[bold]'"])
    assert done.exit_code == 0
    assert done.output.count("models/[/red]x[bold]") == 3


def test_a_file_of_endpoints_that_is_none_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "e.json").write_text("teachers: {}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"e\.json: not a file of endpoints that `mmopd serve` wrote"):
        endpoint.load(path)
    path.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"e\.json: not a file of endpoints"):
        endpoint.load(path)
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        endpoint.load(tmp_path)


def test_a_task_file_that_includes_itself_or_nothing_is_named(tmp_path: Path) -> None:
    (path := tmp_path / "t.yaml").write_text("include: t.yaml", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"t\.yaml: this task file includes itself; .*t\.yaml includes it"):
        read_task(path)
    path.write_text("include: {a: b}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"t\.yaml: include: expected a path or a list of paths, found keys"):
        read_task(path)
    path.write_text("include: none.yaml", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"none\.yaml: no such task file; .*t\.yaml includes it"):
        read_task(path)
