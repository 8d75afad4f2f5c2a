"""The training ranks as one object: its number, and the few collectives for Python objects and statistics.

Model collectives are DeepSpeed's (gloo on CPU, NCCL on GPU). The objects gathered here are small and in CPU memory,
so they have a gloo group of their own on every kind of machine.
"""

import datetime
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mmopd.errors import CheckpointError
from mmopd.runtime.network import free_port

# The variables that srun sets for a task of a job step.
SRUN = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_STEP_NUM_TASKS", "LOCAL_RANK": "SLURM_LOCALID"}
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, seen from one of them."""

    rank: int
    size: int
    device: torch.device
    group: Any  # gloo process group for objects and statistics
    beat: Callable[[], None] = lambda: None  # called before this rank waits for others, to show that it is alive

    def gather_objects(self, value: T) -> list[T]:
        """Return `value` of every rank, in order of rank, on every rank."""
        self.beat()
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def all_sum(self, values: Sequence[float]) -> list[float]:
        """Return element-wise sums over the ranks, in float64."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def all_max(self, values: Sequence[float]) -> list[float]:
        """Return element-wise maxima over the ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.beat()
        dist.barrier(group=self.group)

    def agree(self, fault: str) -> None:
        """Return if no rank has a fault; else raise the first fault on all ranks.

        Raises:
            CheckpointError: a rank has a fault; ranks call this to agree on whether each could write its files.
        """
        if found := next(filter(None, self.gather_objects(fault)), ""):
            raise CheckpointError(found)

    def _reduce(self, values: Sequence[float], how: Any) -> list[float]:
        self.beat()
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=how, group=self.group)
        reduced: list[float] = tensor.tolist()
        return reduced


def start(timeout: float) -> Ranks:
    """Join the process group, or run alone without a launcher.

    The group is described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, or by SLURM's srun.

    Args:
        timeout: seconds after which waiting for another rank is an error.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        os.environ |= place(os.environ)
    import deepspeed
    import deepspeed.ops

    # This op would compile C++ at start, and only inference uses it: training has the collectives of gloo or NCCL.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed's own calls raise it, every time.
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    limit = datetime.timedelta(seconds=timeout)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    deepspeed.init_distributed("nccl" if on_gpu else "gloo", timeout=limit, verbose=False)
    return Ranks(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo", timeout=limit))


def own_rank() -> int:
    """Return the number of this rank, before it joins the others: RANK, or srun's."""
    return int(os.environ.get("RANK") or place(os.environ)["RANK"])


def place(env: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a rank whose launcher sets none: those of an srun task, or of a single rank.

    With srun, MASTER_ADDR and MASTER_PORT are in the environment already: `mmopd train --launcher` has set them.
    """
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return {name: env[slurm] for name, slurm in SRUN.items()}
    return {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def waited_in_vain(error: RuntimeError) -> bool:
    """Return true for the error of a collective that another rank has not joined in time."""
    return any(words in str(error).lower() for words in ("timed out", "timeout"))


def was_left(error: RuntimeError) -> bool:
    """Return true for the error of a collective in which another rank has ended."""
    return any(words in str(error).lower() for words in ("connection closed by peer", "connection reset by peer"))


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
