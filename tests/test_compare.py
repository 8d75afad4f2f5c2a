"""Comparisons: every run is made once, statistics match a calculation by hand, and no result is made twice."""

import csv
import json
from pathlib import Path

import pytest
from rich.console import Console

from mmopd import catalog, settings_file
from mmopd.commands import compare
from mmopd.config import Comparison
from mmopd.errors import UserError
from mmopd.evaluate.score import BenchmarkScore
from mmopd.evaluate.table import Results, Row
from mmopd.runtime.progress import Stages
from mmopd.serving.repeatable import UNREPEATABLE
from mmopd.task.load import load_tasks
from mmopd.teacher.router import check_routes

GRID = {
    "recipe": "recipes/demo.yaml",
    "set": {"train.steps": 3},
    "variants": {"opd": {"label": "OPD", "set": {"algorithm.margin": None}}, "uni": {}},
    "tables": {
        "one": {"title": "One", "seeds": 3, "baseline": "opd", "variants": ["opd", "uni"]},
        "two": {"title": "Two", "seeds": 2, "baseline": "uni", "variants": ["uni"]},
    },
}


def grid(**changes):
    return Comparison.model_validate({**GRID, **changes})


def record(name, column, score):
    return BenchmarkScore(name, "", column, "t", "m", "ok", "", score, 1.0, 100, "", "", {}, {}, 1.0)


def finish(run, sums, digits):
    rows = [Row("base", "base", (record("base", "sums", 50.0), record("base", "digits", 40.0)))]
    rows += [Row("teacher", "teacher", (record("teacher", "sums", 100.0),))]
    rows += [Row("distilled", "distilled", (record("distilled", "sums", sums), record("distilled", "digits", digits)))]
    Results.of(rows).write(run.folder)


@pytest.fixture
def finished(tmp_path):
    runs = compare.plan_runs(grid(), tmp_path)
    for seed, (sums, digits) in enumerate([(90.0, 80.0), (92.0, 78.0), (94.0, 82.0)]):
        finish(runs["opd", seed], sums, digits)
        finish(runs["uni", seed], sums + 1 + seed, digits)
    return runs


def test_tables_share_runs_and_a_changed_setting_is_another_run(tmp_path):
    runs = compare.plan_runs(grid(), tmp_path)
    assert list(runs) == [(variant, seed) for seed in range(3) for variant in ("opd", "uni")]
    assert runs["opd", 1].settings == {"train.steps": 3, "algorithm.margin": None, "seed": 1}
    other = compare.plan_runs(grid(set={"train.steps": 4}), tmp_path)
    assert not {run.folder for run in runs.values()} & {run.folder for run in other.values()}


def test_means_intervals_and_paired_differences_are_those_worked_by_hand(finished):
    columns, rows = compare.lines(grid(), grid().tables["one"], finished)
    assert columns == ["sums", "digits", "average"]
    by_label = {row.label: row for row in rows}
    assert list(by_label) == ["base", "teacher", "OPD", "uni"]
    sums = by_label["OPD"].score["sums"]
    assert (sums.mean, sums.n) == (92.0, 3)
    assert sums.half == pytest.approx(4.303 * 2 / 3**0.5, abs=1e-3)  # t(0.975, 2) x s / sqrt(n)
    difference = by_label["uni"].difference["sums"]  # 1, 2, 3
    assert difference.mean == pytest.approx(2.0)
    assert difference.half == pytest.approx(4.303 * 1 / 3**0.5, abs=1e-3)
    assert by_label["uni"].difference["average"].mean == pytest.approx(1.0)
    assert by_label["OPD"].difference == {}
    assert by_label["base"].score["sums"].half is None
    assert "digits" not in by_label["teacher"].score


def test_the_page_the_csv_and_the_pictures_are_written_from_finished_runs_without_running_anything(finished, tmp_path):
    with Stages(Console(quiet=True)) as stages:
        page = compare.compare("grid", grid(), tmp_path, stages)
    text = page.read_text(encoding="utf-8")
    assert "| OPD | 92.0 ± 5.0 | 80.0 ± 5.0 | 86.0 ± 4.3 |  |  |  |" in text
    assert "+2.0 ± 2.5" in text
    with (tmp_path / "grid.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["table"] for row in rows} == {"one", "two"}
    assert [row["mean"] for row in rows if (row["table"], row["row"], row["column"]) == ("one", "OPD", "sums")] == [
        "92.0"
    ]
    for table in ("one", "two"):
        assert (tmp_path / f"grid-{table}.png").read_bytes().startswith(b"\x89PNG")
        assert f"grid-{table}.png" in text


def test_the_page_says_whether_a_repeated_run_repeats_its_bits():
    cpu, other, gpu = "no MKL_CBWR on a CPU (avx2)", "no MKL_CBWR on a Xeon (avx2)", f"no VARIABLE, {UNREPEATABLE}"
    assert compare.warnings_of({cpu}) == []
    assert "compute differently (no MKL_CBWR on a CPU (avx2) | no MKL" in "".join(compare.warnings_of({cpu, other}))
    assert "A repeated run samples other responses" in "".join(compare.warnings_of({gpu}))


def test_a_run_that_fails_is_named_with_its_log_and_those_before_it_are_kept(finished, tmp_path):
    nowhere = grid(set={"prepare": None, "student.model": str(tmp_path / "nowhere")})
    runs = [*list(finished.values())[:-1], compare.plan_runs(nowhere, tmp_path)["uni", 2]]
    with (
        Stages(Console(quiet=True)) as stages,
        pytest.raises(UserError, match=r"uni-seed2-\w+: .*nowhere: no model.*\n.*seed2-\w+\.log;"),
    ):
        compare.run_all(nowhere, runs, tmp_path / "servers", stages)
    assert all(run.finished for run in runs[:-1])


def test_a_variant_that_is_no_recipe_is_named_before_any_run_is_begun(tmp_path):
    wrong = grid(variants={"opd": {}, "uni": {"set": {"algorithm.margin.delt": 1}}})
    runs = compare.plan_runs(wrong, tmp_path)
    with (
        Stages(Console(quiet=True)) as stages,
        pytest.raises(UserError, match=r"variant 'uni' of the comparison: .*delt.*did you mean 'delta'"),
    ):
        compare.run_all(wrong, list(runs.values()), tmp_path / "servers", stages)
    assert not list(tmp_path.iterdir())


def test_runs_are_made_together_if_and_only_if_they_need_the_same_servers():
    def served(*overrides):
        return compare.what_is_served(catalog.load_recipe("recipes/demo.yaml", overrides=overrides))

    assert served("algorithm.margin=null", "seed=3", "train.steps=2") == served()
    exopd = served("algorithm.objective={kind: exopd, reference: base}")
    for other in (served("fleet=teachers/demo_reference.yaml"), served("student.engine.max_num_seqs=99"), exopd):
        assert other != served()


def test_a_missing_score_is_an_error_and_not_a_mean_of_what_is_left(finished):
    run = finished["uni", 1]
    Results.of([Row("distilled", "distilled", (record("distilled", "sums", 91.0),))]).write(run.folder)
    with pytest.raises(UserError, match="no score in digits"):
        compare.lines(grid(), grid().tables["one"], finished)


def test_a_table_with_an_unknown_variant_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "recipe: r\nvariants: {opd: {}}\ntables: {t: {title: T, baseline: opd, variants: [odp]}}", encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"tables.t: no variant 'odp'; did you mean 'opd'"):
        settings_file.read(Comparison, tmp_path / "c.yaml")


@pytest.mark.parametrize(("name", "steps"), [("compare_demo", 20), ("compare_delta", 40), ("compare_ahead", 40)])
def test_every_variant_of_a_shipped_comparison_is_a_recipe_with_the_same_responses_a_step(name, steps):
    comparison = settings_file.read(Comparison, catalog.shipped() / "recipes" / f"{name}.yaml")
    assert {name for table in comparison.tables.values() for name in table.variants} == comparison.variants.keys()
    tasks = load_tasks()
    for run in compare.plan_runs(comparison, Path("out")).values():
        recipe = catalog.load_recipe(
            comparison.recipe, overrides=[f"{key}={json.dumps(value)}" for key, value in run.settings.items()]
        )
        objective = recipe.algorithm.objective
        each = objective.attempts if objective.kind == "sft" else recipe.rollout.group
        assert (recipe.train.steps, recipe.rollout.prompts * each) == (steps, 256)
        assert recipe.fleet is not None
        kinds = [
            (source.task, tasks[source.task].modality)
            for source in catalog.load_mixture(recipe.mixture).sources.values()
        ]
        check_routes(catalog.load_fleet(recipe.fleet), tasks, kinds)


def test_the_unreliable_teacher_is_taught_wrongly_where_it_is_said_and_nowhere_else():
    world = catalog.load_module(catalog.shipped() / "data" / "demo_compare.py")
    rows = world.lessons(world.UNRELIABLE, 1.0, world.is_stubborn)
    wrong = [row for row in rows if row["solution"].rpartition("=")[2] != row["answer"]]
    stubborn = [row for row in rows if world.is_stubborn(row)]
    assert all(row in wrong for row in stubborn)
    assert len(stubborn) <= len(wrong) < 1.1 * len(stubborn)  # plus one carry in fifty
    assert 0.15 < len(stubborn) / len(rows) < 0.25


def test_a_teacher_of_one_half_of_the_additions_is_careless_in_the_other():
    world = catalog.load_module(catalog.shipped() / "data" / "demo_compare.py")
    rows = world.lessons(world.demo.TEXT_TEACHER, world.demo.BASE.careless, world.is_large)
    wrong = [row for row in rows if row["solution"].rpartition("=")[2] != row["answer"]]
    carries = [row for row in rows if int(row["solution"].split()[0].partition("=")[2]) >= 10]
    by_half = {kind: (sum(map(kind, wrong)), sum(map(kind, carries))) for kind in (world.is_small, world.is_large)}
    assert 0.005 < by_half[world.is_small][0] / by_half[world.is_small][1] < 0.05
    assert 0.7 < by_half[world.is_large][0] / by_half[world.is_large][1] < 0.8
    for split in ("train", "heldout"):
        assert all(len(world.additions(kind, split, 300)) == 300 for kind in (world.is_small, world.is_large))
