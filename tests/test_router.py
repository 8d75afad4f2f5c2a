import pytest
from transformers import AutoTokenizer

from mmopd.config import Fleet
from mmopd.demo.world import build_tokenizer
from mmopd.errors import UserError
from mmopd.records import Prompt
from mmopd.teacher.router import check_routes, check_tokenizers, find_route, show


def fleet(*routes):
    return Fleet.model_validate({"teachers": {n: {"endpoints": ["http://t"]} for n in "abc"}, "routes": list(routes)})


def test_the_first_matching_route_wins():
    routed = fleet({"task": "math_*", "teacher": "a"}, {"modality": "image", "teacher": "b", "view": "text"}, {"teacher": "c"})
    assert find_route(routed, "math_algebra", "image").teacher == "a"
    assert find_route(routed, "charts", "image").view == "text"
    assert find_route(routed, "charts", "text").teacher == "c"


def test_a_pair_without_a_route_is_named_together_with_the_routes_that_there_are():
    routed = fleet({"task": "math_*", "teacher": "a"})
    check_routes(routed, {("math_algebra", "text")})
    with pytest.raises(UserError, match=r"'charts'.*'image'(.|\n)*math_\*"):
        check_routes(routed, {("math_algebra", "text"), ("charts", "image")})


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
    with pytest.raises(UserError, match=r"'fewer'.*1 of 1025 tokens differ.*'<extra>' is 1024 for the student and unknown for the teacher"):
        check_tokenizers(tmp_path / "more", {"fewer": tokenizer_folder})


def test_swapped_ids_are_found(tokenizer_folder, tmp_path):
    text = (tokenizer_folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text.replace('"A": ', '"_": ', 1).replace('"B": ', '"A": ', 1).replace('"_": ', '"B": ', 1))
    (tmp_path / "tokenizer_config.json").write_text((tokenizer_folder / "tokenizer_config.json").read_text())
    with pytest.raises(UserError, match=r"2 of 1024 tokens differ.*'A' is \d+ for the student and \d+ for the teacher"):
        check_tokenizers(tokenizer_folder, {"swapped": tmp_path})


def test_a_folder_without_a_tokenizer_is_named(tokenizer_folder, tmp_path):
    with pytest.raises(UserError, match=str(tmp_path)):
        check_tokenizers(tokenizer_folder, {"nothing": tmp_path})


def test_the_text_view_shows_the_words_and_not_the_images():
    parts = [{"type": "image"}, {"type": "text", "text": "How many?"}]
    prompt = Prompt("s/0", "t", "image", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}), (b"png",), "3")
    text = show(prompt, "text")
    assert text.images == ()
    assert text.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "How many?"}]},
    )
    assert show(prompt, "full") == prompt
