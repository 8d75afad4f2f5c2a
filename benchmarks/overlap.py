"""Compare rollouts that run ahead with rollouts in turn: `python benchmarks/overlap.py`, about fifteen minutes.

It needs the demo's data, and runs the demo's student and teachers with `rollout.async_steps` 0 and 1. First everything
shares two cores. Then teachers answer 1.5 seconds later (a proxy waits, and forwards), like teachers on other machines:
in that time nothing is computed here. Reported after the first three steps: seconds of a step, of its longest part
(rollouts with scoring, or update with sync), and of both in turn; the age of the training tokens; and the results over
the last five steps.
"""

import argparse
import asyncio
import dataclasses
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean

from aiohttp import web
from rich.console import Console
from rich.table import Table

from mmopd.report.metrics import read_lines
from mmopd.runtime.http import session
from mmopd.serving import endpoint

LATE = 1.5  # seconds
WARM = 3  # first steps, not counted
LAST = 5  # steps whose results are reported
FORWARDED = {"content-type", "authorization", "x-request-id"}


@contextmanager
def teachers(folder: Path) -> Iterator[Path]:
    """Serve the demo's teachers, and yield the file of their endpoints."""
    out = folder / "endpoints.json"
    with (folder / "serve.log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mmopd", "serve", "teachers/demo.yaml", "--out", str(out)],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            while not out.exists():
                if process.poll() is not None:
                    raise SystemExit(f"mmopd serve ended: {(folder / 'serve.log').read_text(encoding='utf-8')}")
                time.sleep(0.5)
            yield out
        finally:
            process.terminate()
            process.wait()


async def proxy(target: str, seconds: float) -> str:
    """Start a proxy that answers like `target`, but `seconds` later; return its URL."""
    http = session()

    async def forward(request: web.Request) -> web.Response:
        body = await request.read()
        headers = {k: v for k, v in request.headers.items() if k.lower() in FORWARDED}
        if request.method == "POST":
            await asyncio.sleep(seconds)
        async with http.request(request.method, target + request.path_qs, data=body, headers=headers) as reply:
            return web.Response(status=reply.status, body=await reply.read(), content_type=reply.content_type)

    app = web.Application(client_max_size=1 << 28)
    app.router.add_route("*", "/{path:.*}", forward)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}"


def delayed(file: Path, seconds: float) -> Path:
    """Write a file of the same endpoints through proxies, which run as long as this program."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    there = [
        dataclasses.replace(one, url=asyncio.run_coroutine_threadsafe(proxy(one.url, seconds), loop).result())
        for one in endpoint.load(file).values()
    ]
    out = file.with_name("delayed.json")
    endpoint.save(out, there)
    return out


def train(file: Path, folder: Path, steps: int, ahead: int) -> dict[str, float]:
    """Return the results of a run."""
    run = folder / f"{file.stem}-{ahead}"
    what = [
        "recipes/demo.yaml",
        "suite=null",
        f"train.steps={steps}",
        f"rollout.async_steps={ahead}",
        "train.checkpoint_every=1000",
    ]
    command = [sys.executable, "-m", "mmopd", "train", *what, "--endpoints", str(file), "--run", str(run)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = read_lines(run / "metrics.jsonl")
    later = rows[WARM:]
    end = rows[-LAST:]
    trained = [row["seconds/update"] + row["seconds/sync"] for row in later]
    rolled = [row["rollout_seconds"] for row in later]
    return {
        "step": mean(row["seconds"] for row in later),
        "longest": mean(map(max, zip(trained, rolled, strict=True))),
        "serial": mean(map(sum, zip(trained, rolled, strict=True))),
        "age": mean(row["staleness"] for row in later),
        "kl": mean(row["reverse_kl"] for row in end),
        "right": 100 * mean(row["correct/sampled"] for row in end),
    }


def main() -> None:
    """Run four times, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24)
    steps = parser.parse_args().steps
    table = Table(title=f"{steps} steps of the demo: python benchmarks/overlap.py", title_justify="left")
    for column in ("teachers", "rollouts", "s/step", "longest part", "both in turn", "age", "reverse KL", "right, %"):
        table.add_column(column, justify="left" if column in {"teachers", "rollouts"} else "right")
    with tempfile.TemporaryDirectory(dir=".mmopd") as name, teachers(Path(name)) as near:
        far = delayed(near, LATE)
        for label, file in (("on these cores", near), (f"{LATE} s away", far)):
            for ahead in (0, 1):
                found = train(file, Path(name), steps, ahead)
                times = [f"{found[key]:.2f}" for key in ("step", "longest", "serial", "age")]
                how = "a step ahead" if ahead else "in turn"
                table.add_row(label, how, *times, f"{found['kl']:.3f}", f"{found['right']:.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
