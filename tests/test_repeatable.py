"""An answer does not depend, to the last bit, on what else is asked: resumed runs and engines that are started again
rest on it.
"""

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image
from rich.console import Console

from mmopd.commands import doctor
from mmopd.commands.train import say_kernels
from mmopd.config import Engine
from mmopd.demo.world import Row, additions, digit_sums
from mmopd.modality import Encoder
from mmopd.records import Encoded, Prompt
from mmopd.rollout.student_client import StudentClient
from mmopd.runtime.processes import Children
from mmopd.runtime.run_folder import RunFolder
from mmopd.serving import repeatable
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.repeatable import AVX512, Cpu
from mmopd.serving.servers import Servers, serve, shared_env
from mmopd.serving.specs import ServerSpec
from mmopd.serving.supervisor import Server

ENGINE = Engine(dtype="float32", max_model_len=256, max_num_seqs=64, kv_cache_mib=32)
SIZES = [(32, 32), (64, 32), (96, 32), (160, 32), (64, 64), (96, 96)]  # pixels: 4, 8, 12, 20, 16 and 36 patches
TOKENS = tuple(range(40, 52))  # that are scored
XEON, EPYC = "GenuineIntel", "AuthenticAMD"
Answer = list[tuple[tuple[int, ...], tuple[float, ...]]]


@pytest.fixture(scope="module")
def servers(server: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Two of one model."""
    specs = [ServerSpec(name, model, ENGINE, updatable=True) for name in ("one", "two")]
    with (
        Children() as children,
        serve(specs, children, tmp_path_factory.mktemp("logs"), lambda *event: None) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def items(encoder: Encoder) -> list[Encoded]:
    """12 images of six sizes, and 12 texts."""
    rows = [(row, SIZES[i % len(SIZES)]) for i, row in enumerate(digit_sums("train", 12, seed=0))]
    rows += [(row, SIZES[0]) for row in additions("train", 12, seed=0)]
    return [encoder.encode(prompt(i, row, size)) for i, (row, size) in enumerate(rows)]


def prompt(number: int, row: Row, size: tuple[int, int]) -> Prompt:
    images = []
    for image in row["images"]:
        file = io.BytesIO()
        Image.open(io.BytesIO(image)).resize(size).save(file, "PNG")
        images.append(file.getvalue())
    return Prompt(
        f"p/{number}", "demo", "image" if images else "text", tuple(row["messages"]), tuple(images), row["answer"]
    )


def emptied(server: Endpoint) -> Endpoint:
    """Return the server, its caches of prefixes, of preprocessed images and of encoded ones emptied."""
    for cache in ("prefix", "mm", "encoder"):
        assert httpx.post(f"{server.url}/reset_{cache}_cache", headers=server.headers).status_code == 200
    return server


def ask(server: Endpoint, encoder: Encoder, items: list[Encoded], *, together: bool) -> list[Answer]:
    """Return for each item two sampled responses with their log-probs, and the log-probs of TOKENS."""

    async def one(student: StudentClient, item: Encoded) -> Answer:
        seed = 1000 * int(item.prompt.key.removeprefix("p/"))
        sampled = await student.sample(item, 2, seed, max_tokens=8)
        return [*((r.tokens, r.logprobs) for r in sampled), (TOKENS, tuple(await student.logprobs(item, TOKENS)))]

    async def main() -> list[Answer]:
        async with StudentClient(server, encoder) as student:
            if together:
                return await asyncio.gather(*(one(student, item) for item in items))
            return [await one(student, item) for item in items]

    return asyncio.run(main())


@pytest.fixture(scope="module")
def alone(servers: Servers, encoder: Encoder, items: list[Encoded]) -> list[Answer]:
    """Return the answers to each item by itself, on a server that has seen none of them."""
    return ask(servers["one"], encoder, items, together=False)


def differing(items: list[Encoded], alone: list[Answer], others: list[Answer]) -> list[str]:
    return [item.prompt.modality for item, a, b in zip(items, alone, others, strict=True) if a != b]


WAYS: dict[str, Callable[[Servers, Encoder, list[Encoded]], list[Answer]]] = {
    "all at once, on another server": lambda s, e, items: ask(s["two"], e, items, together=True),
    "once more, found in the caches": lambda s, e, items: ask(s["one"], e, items, together=False),
    "all at once, found in the caches": lambda s, e, items: ask(s["two"], e, items, together=True),
    "all at once, after the caches let them go": lambda s, e, items: ask(emptied(s["one"]), e, items, together=True),
    "reversed": lambda s, e, items: ask(emptied(s["two"]), e, items[::-1], together=False)[::-1],
    "reversed, all at once": lambda s, e, items: ask(emptied(s["two"]), e, items[::-1], together=True)[::-1],
}


@pytest.mark.parametrize("way", WAYS)
def test_items_have_the_bits_that_they_have_alone(
    way: str, servers: Servers, encoder: Encoder, items: list[Encoded], alone: list[Answer]
) -> None:
    found = differing(items, alone, WAYS[way](servers, encoder, items))
    kernels = repeatable.kernels(ENGINE, gpu=False)
    assert not found, (
        f"with {kernels}: {found.count('image')} of 12 images and {found.count('text')} of 12 texts differ"
    )


@pytest.mark.parametrize(
    ("vendor", "flags", "branch"),
    [
        (XEON, AVX512 | {"avx2", "amx_tile"}, "AVX512,STRICT"),  # measured: AVX2 alone does not hold there
        (XEON, {"avx2", "avx512f"}, "AVX2,STRICT"),  # a part of AVX-512 is not enough for MKL's branch
        (XEON, {"avx2", "fma"}, "AVX2,STRICT"),
        (EPYC, {"avx2", "fma"}, ""),  # measured: MKL knows no other branch that holds, and needs none
        (EPYC, AVX512 | {"avx2"}, ""),
        ("", set(), ""),
    ],
)
def test_the_setting_is_chosen_by_what_the_cpu_is(
    vendor: str, flags: set[str], branch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MKL_CBWR", raising=False)
    monkeypatch.setattr(repeatable, "this_cpu", lambda: Cpu(vendor, "a model", frozenset(flags)))
    assert repeatable.environment(Engine(), gpu=False) == ({"MKL_CBWR": branch} if branch else {})
    assert repeatable.holds(Engine(), gpu=False)
    assert (f"MKL_CBWR={branch} on a model" if branch else "no MKL_CBWR on a model") in repeatable.kernels(
        Engine(), gpu=False
    )
    assert repeatable.environment(Engine(repeatable=False), gpu=False) == {}
    assert not repeatable.holds(Engine(repeatable=False), gpu=False)


def test_a_supervisor_has_what_all_its_servers_share_before_it_imports_anything() -> None:
    strict = {"MKL_CBWR": "AVX512,STRICT"}
    student, teacher, other = (
        Server(name="x", model="", argv=[], log="", env=env)
        for env in ({"VLLM_SERVER_DEV_MODE": "1", **strict}, {"VLLM_SERVER_DEV_MODE": "0", **strict}, {})
    )
    assert shared_env([student, teacher]) == strict
    assert shared_env([student, other]) == {}


def test_what_the_user_has_set_is_left_and_nothing_is_promised_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeatable, "this_cpu", lambda: Cpu(XEON, "a model", frozenset(AVX512)))
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    assert repeatable.environment(Engine(), gpu=False) == {}
    assert not repeatable.holds(Engine(), gpu=False)
    found = repeatable.kernels(Engine(), gpu=False)
    assert found == f"MKL_CBWR=AVX2 on a model (avx512f), {repeatable.UNREPEATABLE}"


def test_on_gpus_it_is_batch_invariance_and_has_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_BATCH_INVARIANT", raising=False)
    assert repeatable.environment(Engine(), gpu=True) == {}
    assert not repeatable.holds(Engine(), gpu=True)
    assert repeatable.kernels(Engine(), gpu=True) == f"no VLLM_BATCH_INVARIANT, {repeatable.UNREPEATABLE}"
    assert repeatable.environment(Engine(repeatable=True), gpu=True) == {"VLLM_BATCH_INVARIANT": "1"}
    assert repeatable.holds(Engine(repeatable=True), gpu=True)


def test_the_cpu_is_read_from_what_linux_says(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: A Xeon\nflags\t\t: fpu avx2\n\nprocessor\t: 1\n",
        encoding="utf-8",
    )
    assert repeatable.this_cpu(cpuinfo) == Cpu("GenuineIntel", "A Xeon", frozenset({"fpu", "avx2"}))
    assert repeatable.this_cpu(tmp_path / "none") == Cpu("", "", frozenset())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """One that has made a step on an EPYC."""
    monkeypatch.delenv("MKL_CBWR", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    folder = RunFolder(tmp_path)
    folder.versions.write_text(json.dumps({"mmopd": "1"}), encoding="utf-8")
    folder.metrics.write_text('{"step": 0}\n', encoding="utf-8")
    resume_on(EPYC, folder, monkeypatch)
    return folder


def resume_on(vendor: str, folder: RunFolder, monkeypatch: pytest.MonkeyPatch, engine: Engine = ENGINE) -> str:
    """Return what a resume says on a CPU of a vendor."""
    monkeypatch.setattr(repeatable, "this_cpu", lambda: Cpu(vendor, f"a CPU of {vendor}", frozenset(AVX512)))
    out = io.StringIO()
    say_kernels([engine], folder, Console(file=out, width=200))
    return out.getvalue()


def test_a_resume_on_the_same_kernels_says_nothing_and_one_on_others_says_so_once(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resume_on(EPYC, run, monkeypatch) == ""
    said = resume_on(XEON, run, monkeypatch)
    assert "does not repeat an uninterrupted one bit for bit" in said
    assert "MKL_CBWR=AVX512,STRICT on a CPU of GenuineIntel" in said
    assert "before the resume with no MKL_CBWR on a CPU of AuthenticAMD" in said
    assert resume_on(XEON, run, monkeypatch) == ""
    recorded = json.loads(run.versions.read_text(encoding="utf-8"))
    assert recorded["mmopd"] == "1"
    assert recorded["engines"].index("AMD") < recorded["engines"].index("; then ") < recorded["engines"].index("Intel")


def test_a_resume_without_the_setting_promises_no_bits(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    loose = ENGINE.model_copy(update={"repeatable": False})
    assert f"{repeatable.UNREPEATABLE}, and before the resume with" in resume_on(EPYC, run, monkeypatch, loose)
    assert "(engine.repeatable)" in resume_on(EPYC, run, monkeypatch, loose)


def test_doctor_says_whether_answers_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "gpu_names", list)
    monkeypatch.delenv("MKL_CBWR", raising=False)
    assert doctor.repeatable().state == "ok"
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE,STRICT")
    check = doctor.repeatable()
    assert (check.state, check.way_out) == ("warn", "unset MKL_CBWR")
    assert "MKL_CBWR=COMPATIBLE,STRICT" in check.found
