import pytest
from transformers import AutoTokenizer

from mmopd.config import Fleet, View
from mmopd.demo.world import build_tokenizer
from mmopd.errors import UserError
from mmopd.task.base import Task
from mmopd.teacher.router import RoutedTeacher, check_routes, check_tokenizers, find_route, find_teachers, find_view
from mmopd.teacher.view import BUILT_IN

TASKS = {
    "charts": Task(
        "charts", "image", views={"close": View(min_pixels=9), "text": View(images="drop", instead="(a chart) ")}
    ),
    "math_algebra": Task("math_algebra", "text"),
}


def fleet(*routes, views=None, **keys):
    """Return a fleet of the teachers a, b and c; `keys` are settings of b."""
    teachers = {n: {"endpoints": ["http://t"], **(keys if n == "b" else {})} for n in "abc"}
    return Fleet.model_validate({"teachers": teachers, "routes": list(routes), "views": views or {}})


def test_the_first_matching_route_wins():
    routed = fleet(
        {"task": "math_*", "teacher": "a"}, {"modality": "image", "teacher": "b", "view": "text"}, {"teacher": "c"}
    )
    assert find_route(routed, "math_algebra", "image").teacher == "a"
    assert find_route(routed, "charts", "image").view == "text"
    assert find_route(routed, "charts", "text").teacher == "c"


def test_a_pair_without_a_route_is_named_together_with_the_routes_that_there_are():
    routed = fleet({"task": "math_*", "teacher": "a"})
    check_routes(routed, TASKS, {("math_algebra", "text")})
    with pytest.raises(UserError, match=r"'charts'.*'image'(.|\n)*math_\*"):
        check_routes(routed, TASKS, {("math_algebra", "text"), ("charts", "image")})


def test_a_route_to_several_teachers_has_their_shares_weights_and_own_views():
    routed = fleet({"teacher": {"a": 3, "b": 1}}, weight=2.5, view="caption")
    assert find_teachers(routed, TASKS, "charts", "image") == (
        RoutedTeacher("a", 0.75, 1.0, BUILT_IN["full"]),
        RoutedTeacher("b", 0.25, 2.5, BUILT_IN["caption"]),
    )


def test_the_view_of_a_route_is_for_all_its_teachers():
    routed = fleet({"teacher": {"a": 1, "b": 1}, "view": "blank"}, view="caption")
    assert {one.view for one in find_teachers(routed, TASKS, "charts", "image")} == {BUILT_IN["blank"]}


def test_of_views_with_one_name_the_nearest_wins_fleet_task_built_in():
    routed = fleet({"teacher": "a"}, views={"blank": View(images="blank", max_pixels=64), "close": View(min_pixels=7)})
    assert find_view(routed, TASKS, "charts", "close") == View(min_pixels=7)
    assert find_view(fleet(), TASKS, "charts", "close") == View(min_pixels=9)
    assert find_view(routed, TASKS, "charts", "blank") == View(images="blank", max_pixels=64)
    assert find_view(routed, TASKS, "charts", "text") == View(images="drop", instead="(a chart) ")
    assert find_view(routed, TASKS, "math_algebra", "text") == BUILT_IN["text"]


def test_an_unknown_view_is_named_with_one_like_it_before_training():
    with pytest.raises(UserError, match=r"no view 'capton' for prompts of task 'charts'.*did you mean 'caption'\?"):
        check_routes(fleet({"teacher": "b", "view": "capton"}), TASKS, {("charts", "image")})
    with pytest.raises(UserError, match=r"no view 'clos' .*did you mean 'close'\?"):
        check_routes(fleet({"teacher": {"a": 1, "b": 1}}, view="clos"), TASKS, {("charts", "image")})
    with pytest.raises(UserError, match="no view 'close' for prompts of task 'math_algebra'"):
        check_routes(fleet({"teacher": "b", "view": "close"}), TASKS, {("charts", "image"), ("math_algebra", "text")})


def test_a_view_that_is_not_well_formed_is_named_before_training():
    broken = fleet({"teacher": "a"}, views={"mine": View(hint="{answer.__class__}")})
    with pytest.raises(UserError, match=r"view 'mine' of the fleet: .*plain name such as \{caption\}"):
        check_routes(broken, TASKS, {("charts", "image")})
    tasks = {"charts": Task("charts", "image", views={"odd": View(instead="x")})}
    with pytest.raises(UserError, match=r"view 'odd' of task 'charts': `instead`"):
        check_routes(fleet({"teacher": "a"}), tasks, {("charts", "image")})


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return folder


def test_a_teacher_may_know_more_tokens_but_not_fewer_nor_others(tokenizer_folder, tmp_path):
    more = AutoTokenizer.from_pretrained(tokenizer_folder)
    more.add_tokens(["<extra>"])
    more.save_pretrained(tmp_path / "more")
    check_tokenizers(tokenizer_folder, {"same": tokenizer_folder, "more": tmp_path / "more"})
    with pytest.raises(
        UserError,
        match=r"'fewer'.*1 of 1025 tokens differ.*'<extra>' is 1024 for the student and unknown for the teacher",
    ):
        check_tokenizers(tmp_path / "more", {"fewer": tokenizer_folder})


def test_swapped_ids_are_found(tokenizer_folder, tmp_path):
    text = (tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(
        text.replace('"A": ', '"_": ', 1).replace('"B": ', '"A": ', 1).replace('"_": ', '"B": ', 1), encoding="utf-8"
    )
    (tmp_path / "tokenizer_config.json").write_text(
        (tokenizer_folder / "tokenizer_config.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"2 of 1024 tokens differ.*'A' is \d+ for the student and \d+ for the teacher"):
        check_tokenizers(tokenizer_folder, {"swapped": tmp_path})


def test_a_folder_without_a_tokenizer_is_named(tokenizer_folder, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        check_tokenizers(tokenizer_folder, {"nothing": tmp_path})
