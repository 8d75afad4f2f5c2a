"""Tasks and verifiers: right, wrong and unknown outcomes, in threads and in processes alike."""

import asyncio
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest

from mmopd.demo import world
from mmopd.errors import UserError
from mmopd.records import Outcome
from mmopd.task import verify
from mmopd.task.load import load_tasks
from mmopd.task.verifier_pool import VerifierPool

Verify = Callable[[str, str], Outcome]

RIGHT = [
    (verify.number_after_equals, "7+5=12 4+8+1=13 =132", "132"),
    (verify.number_after_equals, "3+5=8\n", "8"),
    (verify.number_after_equals, "= 1,234 ", "1234"),
    (verify.number_after_equals, "3-5=-2", "-2"),
    (verify.final_number, "So there are 5-3 = 2 apples.", "2"),
    (verify.final_number, "It is 1,234.50", "1234.5"),
    (verify.final_number, "<think>it is 7</think> 8", "8"),
    (verify.exact, "Answer: The Eiffel  Tower.", "the eiffel tower"),
    (verify.exact, "<answer>Ｐａｒｉｓ</answer>", "paris"),
    (verify.exact, "I think\n\\boxed{blue}", "Blue"),
    (verify.choice, "B", "B"),
    (verify.choice, "(b)", "B"),
    (verify.choice, "B. the blue one", "(B)"),
    (verify.choice, "Because of that, the answer is B.", "B"),
    (verify.choice, "The correct option is (C)", "C"),
    (verify.choice, "<think>A or B?</think>\n<answer>\\boxed{B}</answer>", "B"),
    (verify.choice, "\\boxed{\\text{D}}", "D"),
    (verify.choice, "**Answer:** **C**", "C"),
    (verify.choice, "B: because A is too small", "B"),
    (verify.math, "so we get \\boxed{\\sqrt{12}}", "2\\sqrt{3}"),
    (verify.math, "<answer>\\frac{2}{4}</answer>", "0.5"),
    (verify.math, "The answer is $x = 5$.", "5"),
    (verify.math, "\\boxed{\\frac{\\pi}{2}}", "\\pi/2"),
    (verify.math, "\\boxed{(1, 2)}", "(1,2)"),
    (verify.math, "<think>\\boxed{3}</think> It is \\boxed{1{,}000}", "1000"),
]
WRONG = [
    (verify.number_after_equals, "7+5=12 4+8+1=13", "132"),
    (verify.number_after_equals, "=132=", "132"),
    (verify.number_after_equals, "=132 or so", "132"),
    (verify.number_after_equals, "=1320", "132"),
    (verify.number_after_equals, "132", "132"),
    (verify.number_after_equals, "", "132"),
    (verify.final_number, "There are 2, no, 3", "2"),
    (verify.final_number, "the 2nd", "2"),
    (verify.final_number, "<think>2", "2"),
    (verify.exact, "red", "blue"),
    (verify.exact, "", "blue"),
    (verify.choice, "Blue", "B"),  # lmms-eval scores these three 1
    (verify.choice, "Brown", "B"),
    (verify.choice, "BC = 7", "B"),
    (verify.choice, "A cat", "A"),
    (verify.choice, "A or B", "A"),
    (verify.choice, "(A) or (B)", "A"),
    (verify.choice, "A, B", "A"),
    (verify.choice, "(A) (B)", "A"),
    (verify.choice, "I cannot say", "I"),
    (verify.choice, "", "A"),
    (verify.choice, "<think>the answer is A", "A"),
    (verify.math, "\\boxed{7}", "BC = 5"),
    (verify.math, "\\boxed{\\sqrt{11}}", "2\\sqrt{3}"),
    (verify.math, "I do not know", "5"),
    (verify.math, "", "5"),
    (verify.math, "<think>\\boxed{5}", "5"),
]
UNKNOWN = [
    (verify.choice, "B", "Blue"),  # lmms-eval treats any key with a letter from A to H as a choice
    (verify.choice, "A", ""),
    (verify.number_after_equals, "=5", "five"),
    (verify.final_number, "5", ""),
    (verify.math, "\\boxed{5}", ""),
]


@pytest.mark.parametrize(("verifier", "response", "answer"), RIGHT)
def test_right(verifier: Verify, response: str, answer: str) -> None:
    assert verifier(response, answer) == Outcome(1.0)


@pytest.mark.parametrize(("verifier", "response", "answer"), WRONG)
def test_wrong(verifier: Verify, response: str, answer: str) -> None:
    assert verifier(response, answer) == Outcome(0.0)


@pytest.mark.parametrize(("verifier", "response", "answer"), UNKNOWN)
def test_a_key_that_does_not_fit_is_unknown_with_a_reason(verifier: Verify, response: str, answer: str) -> None:
    outcome = verifier(response, answer)
    assert not outcome.known
    assert repr(answer) in outcome.reason


@pytest.mark.parametrize(
    ("task", "right", "wrong", "answer"),
    [
        ("text_math", "\\boxed{12}", "\\boxed{13}", "12"),
        ("text_code", "```python\nprint(7)\n```", "```python\nprint(8)\n```", '{"inputs": [""], "outputs": ["7"]}'),
        ("image_choice", "\\boxed{B}", "\\boxed{C}", "B"),
        ("image_logic", "\\boxed{blue}", "\\boxed{red}", "blue"),
        ("image_chart", "\\boxed{10.2\\%}", "\\boxed{12\\%}", '["10"]'),
        ("image_document", "\\boxed{12 km}", "\\boxed{1999}", '["12 km", "12 kilometres"]'),
    ],
)
def test_the_shipped_tasks_judge_the_keys_that_converters_write(task: str, right: str, wrong: str, answer: str) -> None:
    shipped = load_tasks()[task]
    assert [shipped.verify(response, answer).value for response in (right, wrong)] == [1.0, 0.0]
    assert "?" in str(shipped.prompt("key", "How much?", answer, [b""] * (shipped.modality == "image")).messages)


def test_the_demo_worlds_own_solutions_are_right_and_what_is_cut_or_added_is_not() -> None:
    for row in [*world.additions("train", 50, 0), *world.digit_sums("train", 20, 0)]:
        said, judge = row["solution"], partial(verify.number_after_equals, answer=row["answer"])
        assert judge(said).value == judge(said + " ").value == 1
        for response in (said + "1", said + " x", said.replace("=", " "), said.rpartition("=")[0], ""):
            assert judge(response).value == 0


def test_careless_solutions_are_wrong_where_they_are_careless() -> None:
    rows = world.additions("train", 200, 0, careless=1.0)
    wrong = [verify.number_after_equals(row["solution"], row["answer"]).value == 0 for row in rows]
    carried = [row["answer"] for row, bad in zip(rows, wrong, strict=True) if bad]
    assert 60 < len(carried) < 140  # the units of two numbers give a carry in 45 of 100 cases


def test_math_judges_the_same_in_threads() -> None:
    cases = [(r, a, 1.0) for v, r, a in RIGHT if v is verify.math] + [
        (r, a, 0.0) for v, r, a in WRONG if v is verify.math
    ]
    with ThreadPoolExecutor(4) as threads:
        assert [o.value for o in threads.map(lambda case: verify.math(case[0], case[1]), cases)] == [
            value for *_, value in cases
        ]


HEAD = "from mmopd.task import Task\nfrom mmopd.records import Outcome\nimport os, signal, time\n"
UNRULY = {
    "hangs": "time.sleep(600)",
    "spins": "import re; re.match(r'(a+)+$', 'a' * 64 + 'b')",  # inside C code, where no Python signal handler runs
    "dies": "os._exit(3)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "raises": "raise ZeroDivisionError('of no use')",
    "hungry": "return Outcome(float(len(bytearray(1 << 34)) > 0))",
    "nonsense": "return 1",
    "beyond": "return Outcome(1.5)",
    "prints": "print('[0.0, \"\"]', flush=True); return Outcome(1.0)",
    "right": "return Outcome(float(response == answer))",
}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VerifierPool]:
    """Start two workers with two seconds for each answer, over tasks whose verifiers misbehave."""
    workspace = tmp_path_factory.mktemp("workspace")
    (workspace / "modalities").mkdir()
    for name, body in UNRULY.items():
        text = (
            f"{HEAD}\ndef verify(response, answer):\n    {body}\n\n"
            f"task = Task(name={name!r}, modality='text', verify=verify)\n"
        )
        (workspace / f"modalities/{name}.py").write_text(text, encoding="utf-8")
    with VerifierPool(workspace, workers=2, timeout=2.0) as pool:
        yield pool


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("hangs", "timeout"),
        ("spins", "timeout"),
        ("dies", "verifier process died"),
        ("killed", "verifier process died"),
        ("raises", "ZeroDivisionError: of no use"),
        ("hungry", "MemoryError"),
        ("nonsense", "TypeError: the verifier of 'nonsense' returned 1, which is not an Outcome"),
        ("beyond", r"TypeError: .*value=1\.5"),
    ],
)
def test_a_verifier_that_fails_gives_unknown_and_the_next_one_works(pool: VerifierPool, task: str, reason: str) -> None:
    outcome = pool.submit(task, "a", "a").result()
    assert math.isnan(outcome.value)
    assert re.search(reason, outcome.reason)
    assert [pool.submit("right", "a", answer).result().value for answer in ("a", "b")] == [1.0, 0.0]


def test_what_a_verifier_prints_is_no_outcome(pool: VerifierPool) -> None:
    assert pool.submit("prints", "", "").result() == Outcome(1.0)


def test_an_unknown_task_is_refused(pool: VerifierPool) -> None:
    with pytest.raises(UserError, match=r"no task 'additoins'.*did you mean 'additions'"):
        pool.submit("additoins", "", "")


def test_a_slow_verifier_holds_up_nothing_else(pool: VerifierPool) -> None:
    async def scenario() -> float:
        await asyncio.gather(*(pool.verify("right", "a", "a") for _ in range(4)))  # both workers are running
        slow = asyncio.create_task(pool.verify("hangs", "", ""))
        begin = time.monotonic()
        outcomes = await asyncio.gather(*(pool.verify("right", str(i), "7") for i in range(200)))
        elapsed = time.monotonic() - begin
        assert [o.value for o in outcomes] == [float(i == 7) for i in range(200)]
        assert (await slow).reason == "timeout"
        return elapsed

    assert asyncio.run(scenario()) < 2.0


def test_nothing_is_left_when_the_pool_is_closed(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    with VerifierPool(tmp_path, workers=2, timeout=60.0) as pool:
        assert pool.submit("additions", "1+1=2", "2").result() == Outcome(1.0)
        assert set(psutil.Process().children(recursive=True)) > before
    assert set(psutil.Process().children(recursive=True)) <= before


def test_a_pool_is_closed_at_once_though_a_verifier_hangs(tmp_path: Path) -> None:
    (tmp_path / "modalities").mkdir()
    body = (
        "def verify(response, answer):\n    time.sleep(600)\n\n"
        "task = Task(name='hangs', modality='text', verify=verify)\n"
    )
    (tmp_path / "modalities/hangs.py").write_text(HEAD + body, encoding="utf-8")
    with VerifierPool(tmp_path, workers=1, timeout=600.0) as pool:
        assert pool.submit("additions", "=1", "1").result() == Outcome(1.0)
        pool.submit("hangs", "", "")
        time.sleep(0.2)
        begin = time.monotonic()
    assert time.monotonic() - begin < 5


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """Include a hung worker, and a parent that is killed."""
    (tmp_path / "modalities").mkdir()
    body = "def verify(response, answer):\n    open(answer, 'w').write(str(os.getpid())); time.sleep(600)\n\n"
    (tmp_path / "modalities/hangs.py").write_text(
        f"{HEAD}{body}task = Task(name='hangs', modality='text', verify=verify)\n", encoding="utf-8"
    )
    code = (
        "from mmopd.task.verifier_pool import VerifierPool; from pathlib import Path; import os, time\n"
        f"pool = VerifierPool(Path({str(tmp_path)!r}), workers=1, timeout=3.0)\n"
        f"pool.submit('hangs', '', {str(tmp_path / 'pid')!r})\n"
        f"while not os.path.exists({str(tmp_path / 'pid')!r}): time.sleep(0.05)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=False, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    )
    worker = int((tmp_path / "pid").read_text(encoding="utf-8"))
    for _ in range(80):
        if not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    pytest.fail(f"the worker {worker} lives on")
