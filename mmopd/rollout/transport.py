"""Two ways to move bytes between processes of this machine: broadcast in a separate group, and memory of a shared GPU.

The trainer is rank 0 of the group, the server's workers follow; both also have other groups, which are independent of
it.
"""

import base64
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

HOST = "127.0.0.1"


def join(port: int, rank: int, size: int, device: torch.device, *, timeout: float, listening: int | None = None) -> Any:
    """Return the group, once all have joined it: NCCL for GPUs [not run], gloo for CPUs.

    Args:
        port: where rank 0 waits for the others, on the loopback interface.
        timeout: seconds, for joining and for each broadcast.
        listening: rank 0's socket, which this takes over.

    Raises:
        RuntimeError: not all have joined in time.
    """
    limit = timedelta(seconds=timeout)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        HOST, port, size, is_master=rank == 0, wait_for_workers=False, timeout=limit, master_listen_fd=listening
    )
    if device.type == "cuda":
        options: Any = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
    else:
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=HOST)]
        options._timeout = limit
        group = dist.ProcessGroupGloo(store, rank, size, options)
    broadcast(group, torch.zeros(1, dtype=torch.uint8, device=device)).wait()  # NCCL connects at the first broadcast
    return group


def broadcast(group: Any, data: torch.Tensor) -> dist.Work:
    """Start a broadcast of rank 0's `data` into the `data` of the others; all have the same size."""
    work: dist.Work = group.broadcast([data], dist.BroadcastOptions())
    return work


def handle_of(data: torch.Tensor) -> list[Any]:
    """Return a CUDA IPC handle of GPU memory, JSON-serialisable, for another process to open. [not run on GPU]

    Args:
        data: [n] bytes, its whole storage.
    """
    _, arguments = torch.multiprocessing.reductions.reduce_tensor(data)
    return [base64.b64encode(value).decode() if isinstance(value, bytes) else value for value in arguments[7:]]


def open_handle(handle: Sequence[Any], size: int, device: torch.device) -> torch.Tensor:
    """Return the [n] bytes of `handle_of`, in the memory of the other process. [not run on GPU]"""
    values = [base64.b64decode(value) if isinstance(value, str) else value for value in handle]
    opened: torch.Tensor = torch.multiprocessing.reductions.rebuild_cuda_tensor(
        torch.Tensor, (size,), (1,), 0, torch.storage.TypedStorage, torch.uint8, device.index, *values
    )
    return opened
