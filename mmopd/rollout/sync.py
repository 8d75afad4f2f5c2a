"""Trainer side of the weight sync: vLLM's own protocol over HTTP, with three transports for the weights.

pause -> start -> update (one per bucket) -> finish(version) -> resume, then the server must report the version. Pausing
waits for running requests and clears the prefix, image and encoder caches, which hold results of the old weights.
Several servers get each bucket at the same time; if one fails on the way, the others still get all weights.

- `FileSync`: files in memory (memfd) that the server opens by /proc/PID/fd: no file remains, however the trainer ends,
  no other user can read them, and the size of /dev/shm does not matter. Works with or without GPUs.
- `BroadcastSync`: by NCCL from GPU to GPU [not run on GPU]; by gloo without a GPU, which only tests the protocol.
- `IpcSync`: through the memory of a GPU that trainer and server share and use in turns [not run on GPU].

The server side is `mmopd.rollout.vllm_plugin`; all transports need servers on this machine.
"""

import functools
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

import httpx
import torch

from mmopd.config import Student
from mmopd.rollout.buckets import B, DeviceBucket, MemoryFile, Weights, filled
from mmopd.rollout.transport import HOST, broadcast, handle_of, join
from mmopd.runtime.http import client
from mmopd.serving.endpoint import Endpoint

BUCKET_BYTES = 256 << 20
TIMEOUT = 300.0  # seconds for a step of the protocol
LOOK = 300.0  # seconds to read the version; a server that is gone refuses at once
FRESH = "default"  # vLLM's name for the weights of the folder that it was started with
T = TypeVar("T")


class SyncError(Exception):
    """The engine did not take the weights; its weights are now unknown, so it must not be sampled from."""


class WeightSync(ABC, Generic[B]):
    """Sends weights to vLLM servers, the same to each. A context manager.

    Args:
        endpoints: servers that were started as `updatable`, for this kind of sync.
        timeout: seconds for one step of the protocol; pausing waits for running requests.
        bucket_bytes: largest bucket, unless one tensor is larger.
    """

    shares_gpu: ClassVar[bool] = False  # with the trainer

    def __init__(
        self, endpoints: Sequence[Endpoint], timeout: float = TIMEOUT, bucket_bytes: int = BUCKET_BYTES
    ) -> None:
        self._servers = [Server(endpoint, timeout) for endpoint in endpoints]
        self._timeout = timeout
        self._bucket_bytes = bucket_bytes
        self._threads = ThreadPoolExecutor(len(endpoints))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()
        for server in self._servers:
            server.client.close()

    def send(self, weights: Weights, version: str, *, partial: bool = False) -> None:
        """Replace the weights of all servers; return when they sample from the new ones.

        Args:
            weights: every tensor of the Hugging Face checkpoint by its name there, without a tied head. A tensor is
                copied before the next one is requested, so it may be gathered for that moment only.
            version: is returned with every token that is sampled from these weights.
            partial: these are only some of the tensors, including all that the server fuses with them (q, k and v); the
                others keep the values of the full set that this server got before.

        Raises:
            SyncError: on a server a step failed, a parameter was missing, or it reports another version. The other
                servers have the weights.
        """
        sound = list(self._servers)
        faults = list[SyncError]()

        def each(work: Callable[[Server], None]) -> None:
            running = [(server, self._threads.submit(work, server)) for server in sound]
            for server, future in running:
                try:
                    future.result()
                except SyncError as error:
                    faults.append(error)
                    sound.remove(server)
            if not sound:
                raise faults[0]

        each(functools.partial(self._begin, partial=partial))
        for bucket in filled(weights, self._bucket_bytes, self._make_bucket):
            info = self._describe(bucket) | {"partial": partial}
            each(functools.partial(self._hand_over, bucket=bucket, info=info))
        each(functools.partial(self._end, version=version))
        if faults:
            raise faults[0]

    def versions(self) -> list[str | None]:
        """Return the version of the weights on each server.

        Raises:
            SyncError: one does not answer.
        """
        return [server.version() for server in self._servers]

    def forget(self) -> None:
        """Introduce the trainer again to all servers, since one was restarted."""
        for server in self._servers:
            server.introduced = False

    def sleep(self) -> None:
        """Make a server that shares a GPU free its memory; it must not be used until the next `send`.

        Its weights move to host memory, since a partial set keeps some of them; its KV cache is dropped.

        Raises:
            SyncError: it does not answer, or refuses.
        """
        if self.shares_gpu:
            for server in self._servers:
                server.post("sleep?level=1&mode=wait")

    def _begin(self, server: "Server", partial: bool) -> None:
        if partial and server.version() == FRESH:  # it would refuse the set at the end, and every later one
            raise SyncError(f"{server.name}: it was started again, and has no weights that a partial set could add to")
        if self.shares_gpu:
            server.post("wake_up?tags=weights")
        if not server.introduced:
            self._introduce(server)
            server.introduced = True
        server.post("pause?mode=wait")
        server.post("start_weight_update")

    def _end(self, server: "Server", version: str) -> None:
        server.post("finish_weight_update", {"weight_version": version})
        if self.shares_gpu:
            server.post("wake_up?tags=kv_cache")
        server.post("resume")
        reported = server.version()
        if reported != version:
            raise SyncError(f"{server.name}: reports weight version {reported!r} after {version!r} was sent")

    def _introduce(self, server: "Server") -> None:
        server.post("init_weight_transfer_engine", {"init_info": {}})

    @abstractmethod
    def _make_bucket(self, room: int) -> B:
        """Return a bucket for this many bytes."""

    @abstractmethod
    def _describe(self, bucket: B) -> dict[str, Any]:
        """Return where a server finds the bytes of a full bucket; valid until the next bucket is requested."""

    def _hand_over(self, server: "Server", bucket: B, info: dict[str, Any]) -> None:
        """Let a server load a bucket."""
        server.post("update_weights", {"update_info": info})


class Server:
    """One vLLM server, as the protocol sees it.

    Attributes:
        introduced: true once it knows this trainer.
    """

    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        self.name = endpoint.name
        self._look = min(LOOK, timeout / 10)
        # Each step opens a connection: the server closes idle ones after some seconds, and no step may be sent twice.
        self.client = client(base_url=endpoint.url, headers=endpoint.headers, timeout=timeout, keep_alive=False)
        self.introduced = False

    def version(self) -> str | None:
        """Return the version of the weights on this server."""
        version: str | None = self._call("GET", "weight_info", timeout=self._look).json()["weight_version"]
        return version

    def post(self, path: str, body: dict[str, Any] | None = None) -> None:
        """Make one step of the protocol.

        Raises:
            SyncError: the server does not answer, or refuses.
        """
        self._call("POST", path, body)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None, **limits: Any) -> httpx.Response:
        try:
            answer = self.client.request(method, f"/{path}", json=body, **limits)
        except httpx.HTTPError as error:
            raise SyncError(f"{self.name}: /{path}: {type(error).__name__}: {error}") from error
        if answer.status_code != 200:
            raise SyncError(f"{self.name}: /{path}: status {answer.status_code}: {answer.text[:2000]}")
        return answer


class FileSync(WeightSync[MemoryFile]):
    """Sends files in memory; all servers read the same file."""

    def _make_bucket(self, room: int) -> MemoryFile:
        return MemoryFile(room)

    def _describe(self, bucket: MemoryFile) -> dict[str, Any]:
        return {"path": bucket.finish()}


class BroadcastSync(WeightSync[DeviceBucket]):
    """Broadcasts to all workers of a server, during the request that describes the bucket.

    Each server has its own group with the trainer, so a lost server does not break the others' groups.

    Args:
        workers: GPUs of a server.
        device: holds the weights.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        timeout: float = TIMEOUT,
        bucket_bytes: int = BUCKET_BYTES,
        *,
        workers: int,
        device: torch.device,
    ) -> None:
        super().__init__(endpoints, timeout, bucket_bytes)
        self._size = 1 + workers
        self._device = device
        self._groups: dict[Server, Any] = {}

    def _introduce(self, server: Server) -> None:
        joiner = ThreadPoolExecutor(1)
        with socket.create_server((HOST, 0)) as listening:
            port = listening.getsockname()[1]
            joining = joiner.submit(
                join, port, 0, self._size, self._device, timeout=self._timeout, listening=listening.detach()
            )
        try:
            server.post(
                "init_weight_transfer_engine",
                {"init_info": {"port": port, "size": self._size, "timeout": self._timeout}},
            )
            self._groups[server] = _await(server, joining.result)
        finally:
            joiner.shutdown(wait=False)  # if the server does not join, it waits for the timeout on its own

    def _make_bucket(self, room: int) -> DeviceBucket:
        return DeviceBucket(room, self._device)

    def _describe(self, bucket: DeviceBucket) -> dict[str, Any]:
        return {"size": bucket.filled.numel(), "table": bucket.table}

    def _hand_over(self, server: Server, bucket: DeviceBucket, info: dict[str, Any]) -> None:
        sending = broadcast(self._groups[server], bucket.filled)
        super()._hand_over(server, bucket, info)
        _await(server, sending.wait)


def _await(server: Server, end: Callable[[], T]) -> T:
    """Return the result of an operation in the group with a server; its failure is a SyncError."""
    try:
        return end()
    except RuntimeError as error:
        raise SyncError(f"{server.name}: the group of trainer and engine: {error}") from error


class IpcSync(WeightSync[DeviceBucket]):
    """Sends memory handles of the GPU that trainer and server share; the server sleeps while the trainer learns."""

    shares_gpu = True

    def _make_bucket(self, room: int) -> DeviceBucket:
        return DeviceBucket(room, torch.device("cuda"))

    def _describe(self, bucket: DeviceBucket) -> dict[str, Any]:
        torch.cuda.current_stream().synchronize()
        return {"handle": handle_of(bucket.data), "size": bucket.data.numel(), "table": bucket.table}

    def _hand_over(self, server: Server, bucket: DeviceBucket, info: dict[str, Any]) -> None:
        super()._hand_over(server, bucket, info)
        torch.cuda.ipc_collect()


def connect(student: Student, endpoints: Sequence[Endpoint], timeout: float, device: torch.device) -> WeightSync[Any]:
    """Return the link to the student's engines; `timeout` is for one step of the protocol, in seconds."""
    if student.sync == "broadcast":
        return BroadcastSync(endpoints, timeout, workers=student.engine.tensor_parallel, device=device)
    return IpcSync(endpoints, timeout) if student.sync == "ipc" else FileSync(endpoints, timeout)
