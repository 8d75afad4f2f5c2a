"""Two ways for bytes from one process to another on this machine: a broadcast in a group of their own, and memory of a
shared GPU.

The trainer is rank 0 of the group, the server's workers follow; both have other groups, with which this one has nothing
to do.
"""

import base64
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

HOST = "127.0.0.1"


def join(port: int, rank: int, size: int, device: torch.device, *, timeout: float, listening: int | None = None) -> Any:
    """A group, once all have joined it: NCCL for GPUs [not run], gloo for CPUs.

    Args:
        port: where rank 0 waits for the others, on the loopback interface.
        timeout: seconds, for joining and for each broadcast.
        listening: rank 0's socket, which is given away.

    Raises:
        RuntimeError: not all have come in time.
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
    broadcast(group, torch.zeros(1, dtype=torch.uint8, device=device)).wait()  # NCCL connects with the first one
    return group


def broadcast(group: Any, data: torch.Tensor) -> dist.Work:
    """Begin to send rank 0's data into that of the others; they are of one size."""
    work: dist.Work = group.broadcast([data], dist.BroadcastOptions())
    return work


def handle_of(data: torch.Tensor) -> list[Any]:
    """By which another process opens memory of this GPU, as JSON can say it. [not run on GPU]

    Args:
        data: [n] bytes, all that its storage has.
    """
    _, arguments = torch.multiprocessing.reductions.reduce_tensor(data)
    return [base64.b64encode(value).decode() if isinstance(value, bytes) else value for value in arguments[7:]]


def open_handle(handle: Sequence[Any], size: int, device: torch.device) -> torch.Tensor:
    """The [n] bytes of `handle_of`, the other process's own. [not run on GPU]"""
    values = [base64.b64decode(value) if isinstance(value, str) else value for value in handle]
    opened: torch.Tensor = torch.multiprocessing.reductions.rebuild_cuda_tensor(
        torch.Tensor, (size,), (1,), 0, torch.storage.TypedStorage, torch.uint8, device.index, *values
    )
    return opened
