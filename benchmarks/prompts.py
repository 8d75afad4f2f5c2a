"""Compare reading prompts with the webdataset library and plain Pillow: `python benchmarks/prompts.py`, about a minute.

All read the same files.

- rows: in random order by number; webdataset reads the same tars in sequence, whole rows of bytes, nothing decoded.
- seek: open 101 shards of 10,000 small rows and read row 1,000,000. The shards are hard links to one tar, and so are
  their indices, which makes no difference to either reader. webdataset must read everything before the row: timed over
  the first 30,000 rows, and scaled.
- plan: 512 draws over 35 sources of 100,000 rows.
- memory: 1,000 such shards, 10 million rows; memory of the process after opening them, and after 200,000 draws and
  index look-ups.
- decode: JPEG to RGB from shards, compared with the same bytes in memory and Pillow alone.
"""

import argparse
import io
import os
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table

from mmopd.modality.pixels import open_image, to_rgb
from mmopd.prompts import PromptPlan, Rows, Shards, write_shards
from mmopd.prompts.index import index_path
from mmopd.records import Prompt
from mmopd.task.base import user_turn

SHARD = 10_000  # rows of a shard of small rows


def jpegs(n: int, size: tuple[int, int]) -> list[bytes]:
    """Return pictures with some detail, about 50 kB at 512 x 384."""
    files = []
    for seed in range(n):
        rough = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC).save(file, format="JPEG", quality=88)
        files.append(file.getvalue())
    return files


def image_rows(n: int, files: list[bytes]) -> Iterator[Prompt]:
    """Yield rows with one picture each."""
    for i in range(n):
        yield Prompt(
            str(i), "t", "image", tuple(user_turn(f"What is number {i}?", 1)), (files[i % len(files)],), str(i)
        )


def linked(one: Path, folder: Path, shards: int) -> Path:
    """Make a folder whose shards are all hard links to one."""
    folder.mkdir()
    for number in range(shards):
        tar = folder / f"shard-{number:05d}-of-{shards:05d}.tar"
        os.link(one, tar)
        os.link(index_path(one), index_path(tar))
    return folder


def sequence(folder: Path) -> Iterator[dict[str, object]]:
    """Return the rows as the webdataset library reads them."""
    return iter(webdataset.WebDataset([str(tar) for tar in sorted(folder.glob("*.tar"))], shardshuffle=False))


def seconds_to_read(folder: Path, rows: int) -> float:
    """Return the seconds of the webdataset library, from the start."""
    begin = time.perf_counter()
    read = sum(1 for _ in islice(sequence(folder), rows))
    assert read == rows
    return time.perf_counter() - begin


def rows_per_second(folder: Path) -> tuple[float, float]:
    """Return (ours in random order, webdataset's in sequence); the best of three passes each, in turns."""
    shards = Shards(folder)
    order = np.random.default_rng(0).permutation(len(shards)).tolist()
    ours = []
    theirs = []
    for _ in range(3):
        begin = time.perf_counter()
        for row in order:
            shards[row]
        ours.append(time.perf_counter() - begin)
        theirs.append(seconds_to_read(folder, len(shards)))
    return len(shards) / min(ours), len(shards) / min(theirs)


def seek(folder: Path, row: int) -> tuple[float, float, float]:
    """Return seconds (to open and read a row, to read a row of open shards, to reach it with webdataset).

    The first two are medians of 5.
    """
    cold = []
    warm = []
    some = 3 * SHARD
    for _ in range(5):
        begin = time.perf_counter()
        shards = Shards(folder)
        shards[row]
        opened = time.perf_counter()
        shards[row - 1]
        cold.append(opened - begin)
        warm.append(time.perf_counter() - opened)
    return float(np.median(cold)), float(np.median(warm)), seconds_to_read(folder, some) * row / some


def plan_cost() -> float:
    """Return the seconds for 512 draws over 35 sources; the median of 20."""
    names = [f"s{i}" for i in range(35)]
    plan = PromptPlan({name: Rows(100_000, "") for name in names}, {name: 1.0 + i for i, name in enumerate(names)}, 0)
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        plan.draw(512)
        times.append(time.perf_counter() - begin)
    return float(np.median(times))


def memory(folder: Path) -> tuple[float, float, float]:
    """Return (seconds to open, MiB held then, MiB more after draws and look-ups)."""
    process = psutil.Process()
    before = process.memory_info().rss
    begin = time.perf_counter()
    shards = Shards(folder)
    seconds = time.perf_counter() - begin
    held = process.memory_info().rss
    plan = PromptPlan({"s": Rows(len(shards), shards.fingerprint)}, {"s": 1}, 0)
    plan.draw(10_000)
    start = process.memory_info().rss
    for _ in range(20):
        for _, row in plan.draw(10_000):
            shards.image_sizes(row)
    return seconds, (held - before) / 2**20, (process.memory_info().rss - start) / 2**20


def decode(folder: Path, files: list[bytes]) -> tuple[float, float]:
    """Return images per second (from shards, Pillow alone); the best of five passes each, in turns."""
    shards = Shards(folder)
    ours = []
    theirs = []
    for _ in range(5):
        begin = time.perf_counter()
        for row in range(len(shards)):
            to_rgb(open_image(shards[row].images[0]))
        ours.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        for row in range(len(shards)):
            Image.open(io.BytesIO(files[row % len(files)])).convert("RGB")
        theirs.append(time.perf_counter() - begin)
    return len(shards) / min(ours), len(shards) / min(theirs)


def main() -> None:
    """Write the files, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, help="where the files are written (600 MB); a temporary folder if not given"
    )
    table = Table(title="Reading prompts: python benchmarks/prompts.py", title_justify="left")
    for column in ("", "mmopd", "compared with", "ratio", "goal"):
        table.add_column(column, justify="left" if not column else "right")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().folder) as name:
        root = Path(name)
        small = jpegs(16, (512, 384))
        large = jpegs(8, (1600, 1200))
        write_shards(image_rows(5_000, small), root / "rows", max_rows=1_000)
        write_shards(image_rows(24, large), root / "large")
        write_shards(
            (Prompt(str(i), "t", "text", tuple(user_turn(f"{i}?", 0)), (), str(i)) for i in range(SHARD)),
            root / "small",
        )
        one = next((root / "small").glob("*.tar"))
        million = linked(one, root / "million", 101)
        many = linked(one, root / "many", 1_000)
        ours, theirs = rows_per_second(root / "rows")
        label = f"rows of {np.mean([len(f) for f in small]) / 1000:.0f} kB, per second"
        table.add_row(label, f"{ours:,.0f}", f"webdataset {theirs:,.0f}", f"{ours / theirs:.1f} x", ">= 4 x")
        cold, warm, scaled = seek(million, 1_000_000)
        table.add_row(
            "to row 1,000,000, opening",
            f"{cold * 1e3:.1f} ms",
            f"webdataset {scaled:,.0f} s",
            f"{scaled / cold:,.0f} x",
            "<= 50 ms",
        )
        table.add_row("to row 999,999, open", f"{warm * 1e6:.0f} us", "", "", "")
        table.add_row("plan, 512 draws of 35 sources", f"{plan_cost() * 1e3:.1f} ms", "", "", "<= 10 ms")
        seconds, held, more = memory(many)
        table.add_row(
            "10,000,000 rows, opening", f"{seconds:.2f} s, {held:,.0f} MiB", "", f"{held * 2**20 / 1e7:.0f} B/row", ""
        )
        table.add_row("  and 200,000 draws", f"{more:+.1f} MiB", "", "", "flat")
        ours, theirs = decode(root / "large", large)
        table.add_row(
            "JPEG of 1600 x 1200, per second",
            f"{ours:.1f}",
            f"Pillow {theirs:.1f}",
            f"{ours / theirs:.2f} x",
            ">= 0.9 x",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
