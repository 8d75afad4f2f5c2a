"""Stage of `mmopd train` that makes the distilled student: ranks train it, or teachers are merged."""

import logging
import math
import time

from mmopd.commands.job import Job, give
from mmopd.commands.merge import merge
from mmopd.errors import STOPPED, ConfigError, UserError
from mmopd.runtime.processes import Children
from mmopd.runtime.progress import Stages
from mmopd.runtime.rank_processes import Pulses, check_ranks, last_metrics, start_ranks
from mmopd.runtime.run_folder import RunFolder
from mmopd.runtime.step_lines import Glance, NewSteps, one_line
from mmopd.runtime.watchdog import asked_to_stop
from mmopd.serving.servers import Servers

logger = logging.getLogger(__name__)

MERGED = "merged"  # version of merged weights


def distil(job: Job, run: RunFolder, children: Children, servers: Servers, stages: Stages) -> None:
    """Start the ranks and follow them until they end; on a stop signal let them finish the current step and save a
    checkpoint.

    Raises:
        UserError: a rank or a server ended early; the message has the last lines of its log. Or the last step after
            the signal takes too long.
        SystemExit: the ranks have stopped before their last step, on request or by train.minutes; status STOPPED.
    """
    ranks = job.recipe.train.ranks
    timeout = job.recipe.train.timeout
    with stages.stage("distil") as stage, asked_to_stop() as asked:
        what = ["mmopd.train.rank", str(run.root), *job.changed]
        run.stop.unlink(missing_ok=True)
        running = start_ranks(what, ranks, run.logs, children, launcher=job.launcher, host=job.host)
        new, glance = NewSteps(run.metrics), Glance(servers.restarts)
        stage.total(job.recipe.train.steps, done=_done(run))
        stage.note("starting the ranks")
        until = math.inf
        alive = True
        pulses = Pulses(running, timeout)
        while alive:
            time.sleep(0.5)
            # Read first, so that nothing that the ranks write at their end is missed.
            alive = any(rank.alive for rank in running)
            check_ranks(running, timeout, stopping=asked.is_set() and not job.launcher)
            pulses.check()
            servers.check()
            if asked.is_set() and until == math.inf:
                until = time.monotonic() + timeout
                logger.info("stop requested: the ranks finish their step and save a checkpoint")
                stages.console.print("stop requested: finishing this step, then saving a checkpoint", highlight=False)
                if job.launcher:
                    run.stop.touch()  # a launcher that gets SIGTERM may end its ranks immediately (deepspeed's does)
                else:
                    for rank in running:
                        rank.terminate()
            if time.monotonic() > until:
                raise UserError(
                    f"the ranks have not finished their step within train.timeout = {timeout} s; the last checkpoint "
                    "is unchanged"
                )
            for step in new.read():
                stage.total(job.recipe.train.steps, done=int(step["step"]) + 1)
                stage.log(one_line(step))
                glance.add(step)
                stage.show(glance.rows())
        done = _done(run)
        if asked.is_set() or done < job.recipe.train.steps:
            why = "as requested" if asked.is_set() or job.recipe.train.minutes is None else "by train.minutes"
            how = f"stopped after {done} steps {why}; continue with `mmopd train --resume {run.root}`"
            stages.console.print(how, highlight=False, markup=False, soft_wrap=True)
            raise SystemExit(STOPPED)
        again = "".join(f", {name} restarted {times} x" for name, times in servers.restarts.items())
        stage.outcome = f"{job.recipe.train.steps} steps on {ranks} rank{'s' * (ranks > 1)}{again}"


def _done(run: RunFolder) -> int:
    """Return the number of steps that the metrics of a run have."""
    latest = last_metrics(run.metrics)
    return 0 if latest is None else int(latest["step"]) + 1


def extrapolate(job: Job, run: RunFolder, children: Children, servers: Servers, stages: Stages) -> None:
    """Run ExPO in place of `distil`: merge the teachers into the export folder, and send the weights to the engine.

    Raises:
        ConfigError: a teacher's weights are not on this machine.
        CheckpointError: they do not have the student's architecture.
    """
    if elsewhere := [
        name for name, teacher in job.fleet.teachers.items() if teacher.model is None or teacher.adapter is not None
    ]:
        raise ConfigError(
            f"teacher {elsewhere[0]!r}: expo merges whole weights; every teacher needs a `model` on this machine and "
            "no adapter"
        )
    alpha = job.recipe.algorithm.objective.extrapolation()
    assert alpha is not None
    with stages.stage("merge") as stage:
        weights = {
            teacher.model: teacher.weight for teacher in job.fleet.teachers.values() if teacher.model is not None
        }
        if not run.export.exists():
            merge(job.recipe.student.model, weights, alpha, run.export, stage)
        give(run, run.export, MERGED)
        stage.outcome = f"{len(weights)} teachers, alpha {alpha:g}"
