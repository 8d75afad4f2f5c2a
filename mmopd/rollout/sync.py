"""Trainer side of the weight sync: vLLM's own protocol over HTTP, weights by shared memory.

pause -> start -> update (one per bucket) -> finish(version) -> resume, then the server must report the version. Pausing
waits for running requests and clears the prefix, image and encoder caches, all of which hold what old weights computed.
Buckets are anonymous files (memfd) that the server opens by /proc/PID/fd: nothing is left behind however the trainer
ends, no other user can read them, and the size of /dev/shm does not matter. The server side is `mmopd.rollout.vllm_plugin`.
"""

import json
import mmap
import os
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self

import httpx
import torch

from mmopd.teacher.endpoint import Endpoint

BUCKET_BYTES = 256 << 20
HEADER = 1 << 20  # bytes of a file before its tensors
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
FRESH = "default"  # what vLLM calls the weights of the folder that it was started with


class SyncError(RuntimeError):
    """The engine did not take the weights; what it now holds is unknown, so it must not be sampled from."""


class FileSync:
    """Sends weights to one vLLM server on this machine.

    Args:
        endpoint: a server that was started as `updatable`.
        timeout: seconds for one step of the protocol; pausing waits for running requests.
        bucket_bytes: largest bucket, unless one tensor is larger.
    """

    def __init__(self, endpoint: Endpoint, timeout: float = 300.0, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._endpoint, self._bucket_bytes = endpoint, bucket_bytes
        # A connection for each step: the server closes those that idle for some seconds, and a step must not be sent twice.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(base_url=endpoint.url, headers=endpoint.headers, timeout=timeout, limits=limits)
        self._initialised = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.close()

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], version: str, *, partial: bool = False) -> None:
        """Replace the engine's weights; returns when it samples from the new ones.

        Args:
            weights: every tensor of the Hugging Face checkpoint by its name there, a tied head left out. A tensor is
                copied before the next one is asked for, so it may be gathered for that moment only.
            version: comes back with every token that is sampled from these weights.
            partial: these are some of the tensors, with all that the server fuses with them (q, k and v); the others are as they were
                in the full set that this server got before.

        Raises:
            SyncError: a step failed, a parameter was missing, or the engine reports another version.
        """
        if not self._initialised:
            self._post("init_weight_transfer_engine", {"init_info": {}})
            self._initialised = True
        self._post("pause?mode=wait")
        self._post("start_weight_update")
        for path in memory_files(weights, self._bucket_bytes):
            self._post("update_weights", {"update_info": {"path": path, "partial": partial}})
        self._post("finish_weight_update", {"weight_version": version})
        self._post("resume")
        reported = self.version()
        if reported != version:
            raise SyncError(f"{self._endpoint.name}: reports weight version {reported!r} after {version!r} was sent")

    def version(self) -> str | None:
        """The version of the weights that the engine holds."""
        version: str | None = self._call("GET", "weight_info").json()["weight_version"]
        return version

    def _post(self, path: str, body: dict[str, Any] | None = None) -> None:
        self._call("POST", path, body)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx.Response:
        try:
            answer = self._client.request(method, f"/{path}", json=body)
        except httpx.HTTPError as error:
            raise SyncError(f"{self._endpoint.name}: /{path}: {type(error).__name__}: {error}") from error
        if answer.status_code != 200:
            raise SyncError(f"{self._endpoint.name}: /{path}: status {answer.status_code}: {answer.text[:2000]}")
        return answer


class MemoryFile:
    """A safetensors file in memory, which other processes of this user read by its `path` while it is open.

    A tensor is copied once, from wherever it is to its place in the file. What the file says of its tensors has HEADER bytes before
    them, filled up with blanks, as the format allows.

    Args:
        room: bytes of tensors that fit; memory is taken as they come.
    """

    def __init__(self, room: int) -> None:
        self._file = os.memfd_create("mmopd-weights")
        os.ftruncate(self._file, HEADER + room)
        self._map = mmap.mmap(self._file, HEADER + room)
        self._room, self._used = room, 0
        self._header: dict[str, Any] = {}
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._map.close()
        os.close(self._file)

    def has_room(self, tensor: torch.Tensor) -> bool:
        """Whether it fits; one that is larger than any room is alone."""
        return self._used + tensor.nbytes <= self._room

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a tensor that fits."""
        end = self._used + tensor.nbytes
        if tensor.numel():
            place = torch.frombuffer(self._map, dtype=tensor.dtype, count=tensor.numel(), offset=HEADER + self._used)
            place.view(tensor.shape).copy_(tensor.detach())
        self._header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [self._used, end]}
        self._used = end

    def finish(self) -> str:
        """Make it whole; its path."""
        header = json.dumps(self._header).encode()
        if len(header) > HEADER - 8:
            raise ValueError(f"{len(self._header)} tensors in one file: their names take {len(header)} bytes of {HEADER}")
        self._map[:HEADER] = (HEADER - 8).to_bytes(8, "little") + header.ljust(HEADER - 8)
        os.ftruncate(self._file, HEADER + self._used)
        return self.path


def memory_files(weights: Iterable[tuple[str, torch.Tensor]], room: int) -> Iterator[str]:
    """Paths of files in memory that hold the tensors, one after the other; a path is good until the next one is asked for."""
    weights = iter(weights)
    following = next(weights, None)
    while following is not None:
        with MemoryFile(max(room, following[1].nbytes)) as file:
            while following is not None and file.has_room(following[1]):
                file.add(*following)
                following = next(weights, None)
            yield file.finish()
