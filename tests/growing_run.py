"""A run folder that grows as a run writes it: with the writers of launcher and ranks, and made-up values."""

import io
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from run_folders import row, write_run

from mmopd.report.heatmap import as_json
from mmopd.report.metrics import JsonLines, MetricsWriter
from mmopd.runtime import logs
from mmopd.runtime.progress import Stages
from mmopd.runtime.run_folder import RunFolder
from mmopd.runtime.status import LAUNCHER, replace, telling
from mmopd.serving.endpoint import Endpoint
from mmopd.serving.replicas import ReplicaPool
from mmopd.serving.servers import Servers

STEPS = 20
DIES = 9  # the step before which the server of a teacher is killed
READY = 13  # the step before which it is ready again
KILLED = "image_teacher.0"


def metrics_of(step: int) -> dict[str, float]:
    learnt = 1 - math.exp(-step / 8)
    fails = {"scoring/failed/connection": 3.0, "absent": 2.0} if step == DIES else {"absent": 0.0}
    return fails | {
        "accuracy/additions": 0.5 + 0.45 * learnt,
        "accuracy/digit_sum": 0.35 + 0.5 * learnt,
        "correct/sampled": 0.4 + 0.5 * learnt,
        "return": -0.6 + 0.5 * learnt,
        "reverse_kl": 0.6 - 0.5 * learnt,
        "loss": 0.4 - 0.3 * learnt,
        "share/kept": 0.6,
        "unknown": 0.0,
        "seconds": 2.0,
        "seconds/rollout": 1.2,
        "seconds/update": 0.5,
        "seconds/sync": 0.3,
    }


def grow(root: Path, seconds: float) -> Iterator[int]:
    """Write a run of `STEPS` steps into `root`, and yield each step when it is written; pause after each.

    A server of a teacher is killed on the way, and started again.
    """
    write_run(root)
    run = RunFolder(root)
    for path in (run.metrics, run.samples, run.results, run.timings):
        path.unlink()
    run.recipe_file.write_text(run.recipe_file.read_text("utf-8").replace("steps: 100", f"steps: {STEPS}"), "utf-8")
    run.logs.mkdir()
    replicas = [Endpoint(name, "http://127.0.0.1:9", name, "", "teacher") for name in (KILLED, "text_teacher.0")]
    student = Endpoint("student", "http://127.0.0.1:9", "student", "", "student")
    pools = [
        ReplicaPool([one], None, timeout=9, patience=9, concurrency=8, counts=Counter())  # type: ignore[arg-type]
        for one in (student, *replicas)
    ]
    doing = ["start"]
    with ExitStack() as stack:
        stages = Stages(Console(file=io.StringIO(), force_terminal=False), run.timings)
        stack.enter_context(logs.to_file(run.logs / "launcher.log", "launcher"))
        stack.enter_context(telling(run.status_of(LAUNCHER), stages.now))
        for rank in ("rank0", "rank1"):
            (run.logs / f"{rank}.log").write_text(f"{rank} is here\n", encoding="utf-8")
        with stages.stage("serve") as stage:
            stage.outcome = "3 vLLM servers"
            stages.servers.update({one.name: "ready after 2.0 s" for one in (student, *replicas)})
        endpoints = {one.name: [one] for one in (student, *replicas)}
        servers = Servers(endpoints, {}, run.logs, stages.servers.__setitem__)
        metrics, samples = MetricsWriter(run.metrics, 0), JsonLines(run.samples, 0)
        stack.callback(metrics.close)
        stack.callback(samples.close)
        stage = stack.enter_context(stages.stage("distil"))
        ranks = [
            stack.enter_context(
                telling(run.status_of(rank), lambda: {"doing": doing[0], "pools": [pool.status() for pool in pools]})
            )
            for rank in ("rank0", "rank1")
        ]
        assert len(ranks) == 2
        for step in range(STEPS):
            doing[0] = f"step {step}, rollout"
            for pool in pools:
                pool.replicas[0].in_flight = 3
                pool.replicas[0].answered += 16
                pool.replicas[0].latencies.append(0.04 + step / 200)
            pools[1]._waiting = 5
            if step == DIES:
                servers._heed("restarted", KILLED, "-9")
                pools[1].replicas[0].faults = 3
            if step == READY:
                stages.servers[KILLED] = "ready after 4.0 s"
            write_step(run, step, metrics, samples)
            stage.total(STEPS, done=step + 1)
            stages.say(f"  right      additions 0.50 → {metrics_of(step)['accuracy/additions']:.2f}")
            yield step
            time.sleep(seconds)
        servers._http.close()


def write_step(run: RunFolder, step: int, metrics: MetricsWriter, samples: JsonLines) -> None:
    """Write what rank 0 writes at the end of a step."""
    rows = [
        as_json(row(step, task, float(outcome), prompt=f"What is their sum, in step {step}?"))
        for task in ("digit_sum", "additions")
        for outcome in (0, 1)
    ]
    if step in {0, STEPS - 1}:
        for one in rows:
            samples.append(one)
    replace(run.newest, "".join(json.dumps(one) + "\n" for one in rows))
    metrics.write(step, metrics_of(step))
