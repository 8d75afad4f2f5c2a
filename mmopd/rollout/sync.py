"""Trainer side of the weight sync: vLLM's own protocol over HTTP; the classes differ in how the weights travel.

pause -> start -> update (one per bucket) -> finish(version) -> resume, then the server must report the version. Pausing
waits for running requests and clears the prefix, image and encoder caches, all of which hold what old weights computed.

- `FileSync`: files in memory (memfd) that the server opens by /proc/PID/fd: nothing is left behind however the trainer ends, no
  other user can read them, and the size of /dev/shm does not matter. With GPUs or without.
- `BroadcastSync`: by NCCL from GPU to GPU [not run on GPU]; by gloo without one, where it only proves the protocol.
- `IpcSync`: out of the memory of a GPU that trainer and server share, and take in turns [not run on GPU].

The server side is `mmopd.rollout.vllm_plugin`; all of them are for a server on this machine.
"""

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import httpx
import torch

from mmopd.config import Student
from mmopd.rollout.buckets import DeviceBucket, MemoryFile, Weights, filled
from mmopd.rollout.group import HOST, broadcast, handle_of, join
from mmopd.teacher.endpoint import Endpoint

BUCKET_BYTES = 256 << 20
FRESH = "default"  # what vLLM calls the weights of the folder that it was started with
T = TypeVar("T")


class SyncError(RuntimeError):
    """The engine did not take the weights; what it now holds is unknown, so it must not be sampled from."""


class WeightSync(ABC):
    """Sends weights to one vLLM server. A context manager.

    Args:
        endpoint: a server that was started as `updatable`, for this kind of sync.
        timeout: seconds for one step of the protocol; pausing waits for running requests.
        bucket_bytes: largest bucket, unless one tensor is larger.
    """

    shares_gpu: ClassVar[bool] = False  # with the trainer

    def __init__(self, endpoint: Endpoint, timeout: float = 300.0, bucket_bytes: int = BUCKET_BYTES) -> None:
        self._endpoint, self._timeout, self._bucket_bytes = endpoint, timeout, bucket_bytes
        # A connection for each step: the server closes those that idle for some seconds, and a step must not be sent twice.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = httpx.Client(base_url=endpoint.url, headers=endpoint.headers, timeout=timeout, limits=limits)
        self._introduced = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._client.close()

    def send(self, weights: Weights, version: str, *, partial: bool = False) -> None:
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
        if self.shares_gpu:
            self._post("wake_up?tags=weights")
        if not self._introduced:
            self._introduce()
            self._introduced = True
        self._post("pause?mode=wait")
        self._post("start_weight_update")
        self._hand_over(weights, partial)
        self._post("finish_weight_update", {"weight_version": version})
        if self.shares_gpu:
            self._post("wake_up?tags=kv_cache")
        self._post("resume")
        reported = self.version()
        if reported != version:
            raise SyncError(f"{self._endpoint.name}: reports weight version {reported!r} after {version!r} was sent")

    def version(self) -> str | None:
        """The version of the weights that the engine holds."""
        version: str | None = self._call("GET", "weight_info").json()["weight_version"]
        return version

    def forget(self) -> None:
        """The server was started again, and knows nothing of this trainer."""
        self._introduced = False

    def rest(self) -> None:
        """The engine is asked nothing until the next `send`: one that shares a GPU gives its memory back.

        Its weights wait in the memory of the host, since a partial set leaves some of them as they are; its KV cache is gone.

        Raises:
            SyncError: it does not.
        """
        if self.shares_gpu:
            self._post("sleep?level=1&mode=wait")

    def _introduce(self) -> None:
        self._post("init_weight_transfer_engine", {"init_info": {}})

    @abstractmethod
    def _hand_over(self, weights: Weights, partial: bool) -> None:
        """Send all, bucket by bucket."""

    def _update(self, **info: Any) -> None:
        self._post("update_weights", {"update_info": info})

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


class FileSync(WeightSync):
    """By files in memory."""

    def _hand_over(self, weights: Weights, partial: bool) -> None:
        for file in filled(weights, self._bucket_bytes, MemoryFile):
            self._update(path=file.finish(), partial=partial)


class BroadcastSync(WeightSync):
    """By a broadcast to all workers of the server, at the same time as the request that tells them what it holds.

    Args:
        workers: GPUs of the server.
        device: where the weights are.
    """

    def __init__(
        self, endpoint: Endpoint, timeout: float = 300.0, bucket_bytes: int = BUCKET_BYTES, *, workers: int, device: torch.device
    ) -> None:
        super().__init__(endpoint, timeout, bucket_bytes)
        self._size, self._device = 1 + workers, device

    def _introduce(self) -> None:
        with socket.create_server((HOST, 0)) as listening, ThreadPoolExecutor(1) as pool:
            port = listening.getsockname()[1]
            joining = pool.submit(join, port, 0, self._size, self._device, timeout=self._timeout, listening=listening.detach())
            self._post("init_weight_transfer_engine", {"init_info": {"port": port, "size": self._size, "timeout": self._timeout}})
            self._group = self._await(joining.result)

    def _hand_over(self, weights: Weights, partial: bool) -> None:
        for bucket in filled(weights, self._bucket_bytes, lambda room: DeviceBucket(room, self._device)):
            sending = broadcast(self._group, bucket.filled)
            self._update(size=bucket.filled.numel(), table=bucket.table, partial=partial)
            self._await(sending.wait)

    def _await(self, end: Callable[[], T]) -> T:
        try:
            return end()
        except RuntimeError as error:
            raise SyncError(f"{self._endpoint.name}: the group of trainer and engine: {error}") from error


class IpcSync(WeightSync):
    """By handles of memory of the GPU that trainer and server share; the server sleeps while the trainer learns."""

    shares_gpu = True

    def _hand_over(self, weights: Weights, partial: bool) -> None:
        for bucket in filled(weights, self._bucket_bytes, lambda room: DeviceBucket(room, torch.device("cuda"))):
            torch.cuda.current_stream().synchronize()
            self._update(handle=handle_of(bucket.data), size=bucket.data.numel(), table=bucket.table, partial=partial)
            torch.cuda.ipc_collect()


def connect(student: Student, endpoint: Endpoint, device: torch.device) -> WeightSync:
    """The link to the student's engine that its recipe asks for."""
    if student.sync == "broadcast":
        return BroadcastSync(endpoint, workers=student.engine.tensor_parallel, device=device)
    return IpcSync(endpoint) if student.sync == "ipc" else FileSync(endpoint)
