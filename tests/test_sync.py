"""Weight transfer: the contents of the buckets for another reader, their cuts, that no memory is left, and the requests
that a server gets.
"""

import inspect
import json
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from mmopd.rollout.buckets import HEADER, DeviceBucket, MemoryFile, filled, unpack
from mmopd.rollout.sync import FileSync, IpcSync, SyncError
from mmopd.serving.endpoint import Endpoint

WEIGHTS = {
    "bf16": torch.randn(3, 5).bfloat16(),
    "float": torch.randn(7),  # after an odd number of half floats
    "transposed": torch.randn(4, 6).t(),
    "empty": torch.zeros(0, 8),
    "half": torch.randn(2, 2, 2).half(),
    "scalar": torch.tensor(0.25),
    "large": torch.nn.Parameter(torch.randn(100)),
}


def files() -> int:
    """Return the number of files that this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("room", [1, 200, 1 << 20])
def test_every_tensor_is_read_as_it_was_given_however_the_files_are_cut(room: int) -> None:
    before, found, cuts = files(), dict[str, torch.Tensor](), list[int]()
    for file in filled(WEIGHTS.items(), room, MemoryFile):
        part = load_file(file.finish())
        cuts.append(sum(t.nbytes for t in part.values()))
        found |= {name: t.clone() for name, t in part.items()}
        del part
    assert files() == before
    assert found.keys() == WEIGHTS.keys()
    for name, weight in WEIGHTS.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight.detach()), name
    assert all(cut <= max(room, 400) for cut in cuts)
    assert (len(cuts) == 1) == (room == 1 << 20)


def test_a_file_takes_the_memory_of_what_is_in_it_and_no_more() -> None:
    with MemoryFile(1 << 30) as file:
        file.add("w", torch.ones(1000))
        path = Path(file.finish())
        assert path.stat().st_size == HEADER + 4000
        assert path.stat().st_blocks * 512 < HEADER + (1 << 16)


def test_names_that_do_not_fit_are_refused() -> None:
    with MemoryFile(10) as file:
        file.add("x" * HEADER, torch.ones(1))
        with pytest.raises(ValueError, match="1 tensors in one file: their names take"):
            file.finish()


@pytest.mark.parametrize("room", [1, 200, 1 << 20])
def test_every_tensor_of_a_bucket_is_where_its_table_says(room: int) -> None:
    found, cuts = dict[str, torch.Tensor](), 0
    for bucket in filled(WEIGHTS.items(), room, lambda room: DeviceBucket(room, torch.device("cpu"))):
        assert bucket.filled.numel() <= max(room, 400) + 64
        found |= dict(unpack(bucket.filled.clone(), json.loads(json.dumps(bucket.table))))
        cuts += 1
    assert found.keys() == WEIGHTS.keys()
    assert (cuts == 1) == (room == 1 << 20)
    for name, weight in WEIGHTS.items():
        assert found[name].dtype == weight.dtype
        assert torch.equal(found[name], weight.detach()), name


def test_a_server_that_shares_the_gpu_is_woken_by_halves_around_its_new_weights() -> None:
    asked = list[str]()

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.raw_path.decode())
        return httpx.Response(200, json={"weight_version": "step-1"})

    with IpcSync([Endpoint("student", "http://127.0.0.1:9", "student", "", "student")]) as link:
        link._servers[0].client = httpx.Client(base_url="http://127.0.0.1:9", transport=httpx.MockTransport(answer))
        link.sleep()
        link.send([], "step-1")
    first = [
        "/sleep?level=1&mode=wait",
        "/wake_up?tags=weights",
        "/init_weight_transfer_engine",
        "/pause?mode=wait",
        "/start_weight_update",
    ]
    assert asked == [*first, "/finish_weight_update", "/wake_up?tags=kv_cache", "/resume", "/weight_info"]


def test_of_several_servers_one_that_is_lost_keeps_no_other_from_its_weights() -> None:
    asked: dict[str, list[str]] = {"a": [], "b": [], "c": []}
    loaded, dying = list[str](), {"b"}

    def answer(request: httpx.Request) -> httpx.Response:
        name, path = request.url.host, request.url.path
        asked[name].append(path)
        if name in dying and asked[name].count("/update_weights") == 2:
            raise httpx.ReadError("it is dead", request=request)
        if name == "c" and path == "/update_weights":
            loaded.extend(load_file(json.loads(request.content)["update_info"]["path"]))
        return httpx.Response(200, json={"weight_version": "step-1"})

    with FileSync([Endpoint(name, f"http://{name}", "", "", "student") for name in asked], bucket_bytes=1) as link:
        for server in link._servers:
            server.client = httpx.Client(base_url=f"http://{server.name}", transport=httpx.MockTransport(answer))
        with pytest.raises(SyncError, match="b: /update_weights: ReadError: it is dead"):
            link.send(WEIGHTS.items(), "step-1")
        assert asked["b"][-2:] == ["/update_weights"] * 2, "it is asked nothing more"
        assert asked["a"] == asked["c"]
        assert asked["a"][-3:] == ["/finish_weight_update", "/resume", "/weight_info"]
        assert loaded == list(WEIGHTS)
        dying.clear()
        asked["b"].clear()
        link.forget()
        link.send(WEIGHTS.items(), "step-1")
        assert asked["b"] == asked["a"][len(asked["a"]) // 2 :]


def test_torch_opens_memory_of_a_gpu_by_what_a_handle_says() -> None:
    """Check the order of the values that `open_handle` passes: on a machine without a GPU no other test would notice a
    change.
    """
    names = [
        "tensor_cls",
        "tensor_size",
        "tensor_stride",
        "tensor_offset",
        "storage_cls",
        "dtype",
        "storage_device",
        "storage_handle",
    ]
    names += [
        "storage_size_bytes",
        "storage_offset_bytes",
        "requires_grad",
        "ref_counter_handle",
        "ref_counter_offset",
        "event_handle",
    ]
    assert list(inspect.signature(rebuild_cuda_tensor).parameters) == [*names, "event_sync_required"]
