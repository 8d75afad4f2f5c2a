"""Pack weights into buckets of bounded size for transport: many small tensors in one piece of memory.

A tensor is copied once, from its source to its place in the bucket, before the next one is requested. Trainer (`sync`)
and server (`vllm_plugin`) both use this.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import torch

HEADER = 1 << 20  # bytes of a file before its tensors
ALIGNMENT = 64  # bytes, of a tensor in device memory
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

Weights = Iterable[tuple[str, torch.Tensor]]  # by their names in a Hugging Face checkpoint
Place = tuple[str, str, list[int], int]  # name, dtype, shape, first byte of a tensor in a bucket, as JSON has them


class MemoryFile:
    """A safetensors file in memory; other processes of this user can read it by its `path` while it is open.

    The header has a fixed size of HEADER bytes, padded with blanks, as the format allows. The file is written, not
    mapped: new pages cost half as much that way.

    Args:
        room: bytes of tensors that fit; memory is allocated as they are added.
    """

    def __init__(self, room: int) -> None:
        self._file = os.memfd_create("mmopd-weights")
        self._room = room
        self._used = 0
        self._header: dict[str, Any] = {}
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def has_room(self, tensor: torch.Tensor) -> bool:
        """Return true if the tensor fits; one that is larger than `room` needs a file of its own."""
        return self._used + tensor.nbytes <= self._room

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a tensor that fits."""
        end = self._used + tensor.nbytes
        self._write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data, HEADER + self._used)
        self._header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._used, end],
        }
        self._used = end

    def finish(self) -> str:
        """Write the header, and return the path."""
        header = json.dumps(self._header).encode()
        if len(header) > HEADER - 8:
            raise ValueError(
                f"{len(self._header)} tensors in one file: their names take {len(header)} bytes of {HEADER}"
            )
        self._write(memoryview((HEADER - 8).to_bytes(8, "little") + header.ljust(HEADER - 8)), 0)
        return self.path

    def _write(self, data: memoryview, begin: int) -> None:
        while data:  # the kernel takes at most 2 GiB at a time
            written = os.pwrite(self._file, data, begin)
            data = data[written:]
            begin += written


class DeviceBucket:
    """Tensors in one piece of memory on a device.

    Args:
        room: bytes.
        device: holds the memory.

    Attributes:
        data: all of it, as bytes.
        table: position of each tensor.
    """

    def __init__(self, room: int, device: torch.device) -> None:
        self.data = torch.empty(room + ALIGNMENT, dtype=torch.uint8, device=device)
        self.table: list[Place] = []
        self._used = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Do nothing; there is nothing to close."""

    @property
    def filled(self) -> torch.Tensor:
        """The bytes in use."""
        return self.data[: self._used]

    def has_room(self, tensor: torch.Tensor) -> bool:
        """Return true if the tensor fits; one that is larger than `room` needs a bucket of its own."""
        return self._used + tensor.nbytes <= self.data.numel()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Copy a tensor that fits."""
        place = (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), self._used)
        _at(self.data, place).copy_(tensor.detach())
        self.table.append(place)
        self._used = min(-(-(self._used + tensor.nbytes) // ALIGNMENT) * ALIGNMENT, self.data.numel())


B = TypeVar("B", MemoryFile, DeviceBucket)


def filled(weights: Weights, room: int, make: Callable[[int], B]) -> Iterator[B]:
    """Yield buckets that hold the tensors, one after the other; each is valid until the next one is requested.

    Args:
        room: bytes of a bucket, unless one tensor has more.
        make: returns a bucket with this many bytes.
    """
    weights = iter(weights)
    following = next(weights, None)
    while following is not None:
        with make(max(room, following[1].nbytes)) as bucket:
            while following is not None and bucket.has_room(following[1]):
                bucket.add(*following)
                following = next(weights, None)
            yield bucket


def unpack(data: torch.Tensor, table: Sequence[Place]) -> Iterator[tuple[str, torch.Tensor]]:
    """Return the tensors of a `DeviceBucket` by name: views into its bytes."""
    return ((place[0], _at(data, place)) for place in table)


def _at(data: torch.Tensor, place: Place) -> torch.Tensor:
    _, name, shape, begin = place
    dtype: torch.dtype = getattr(torch, name)
    size = dtype.itemsize
    for n in shape:
        size *= n
    return data[begin : begin + size].view(dtype).view(shape)
