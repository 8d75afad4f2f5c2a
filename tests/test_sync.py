"""Weights as files in memory: what another reader finds in them, how they are cut, and that nothing of them is left."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmopd.rollout.sync import HEADER, MemoryFile, memory_files


def files() -> int:
    """How many this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("room", [1, 200, 1 << 20])
def test_every_tensor_is_read_as_it_was_given_however_the_files_are_cut(room: int) -> None:
    weights = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "float": torch.randn(7),  # behind an odd number of half floats
        "transposed": torch.randn(4, 6).t(),
        "empty": torch.zeros(0, 8),
        "half": torch.randn(2, 2, 2).half(),
        "scalar": torch.tensor(0.25),
        "large": torch.nn.Parameter(torch.randn(100)),
    }
    before, found, cuts = files(), dict[str, torch.Tensor](), list[int]()
    for path in memory_files(weights.items(), room):
        part = load_file(path)
        cuts.append(sum(t.nbytes for t in part.values()))
        found |= {name: t.clone() for name, t in part.items()}
        del part
    assert files() == before
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
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
