"""A run as the page shows it: parts in HTML, made again when their files have changed, and the data of the charts."""

import hashlib
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmopd.report import heatmap, html, verdict
from mmopd.report.charts import POINTS, Tasks, curves, held_out_curves, tasks_of
from mmopd.report.facts import at_the_end, facts, value_of
from mmopd.report.loggers.state import states
from mmopd.report.run_files import LeftOut, Metrics, RunFiles, short
from mmopd.runtime.run_folder import RunFolder
from mmopd.runtime.status import DONE
from mmopd.watch.logs import faults, last_lines, log_names, searched
from mmopd.watch.metrics import GrowingMetrics, faults_of
from mmopd.watch.status import Now, Statuses, servers

SAMPLES = 64 * 2**20  # bytes; a larger samples.jsonl is not read, the newest responses still are
METRIC_FAULTS = 8  # steps in which something failed that are listed


class Made(NamedTuple):
    """A part that was made from files, and what it leaves out of them."""

    of: Hashable
    value: Any
    left_out: LeftOut


class WatchedRun:
    """A run folder, in progress or finished, in whatever state its files are.

    Args:
        root: the folder.
        name: on the page.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.run = RunFolder(root)
        self._metrics = GrowingMetrics(self.run)
        self._statuses = Statuses(self.run)
        self._made: dict[str, Made] = {}
        self._lock = threading.Lock()

    def view(self) -> "View":
        """Return what the folder says now."""
        with self._lock:
            return View(self)

    def made(self, name: str, paths: Sequence[Path], build: Callable[[RunFiles], Any], *of: Hashable) -> Any:
        """Return what `build` returns; it is called again if a file or a value of `of` has changed."""
        now = (*map(_signature, paths), *of)
        if name not in self._made or self._made[name].of != now:
            files = RunFiles(self.run)
            self._made[name] = Made(now, build(files), files.left_out)
        return self._made[name].value

    def version(self, name: str) -> Hashable:
        """Return what a part was made from."""
        return self._made[name].of

    def left_out(self) -> list[LeftOut]:
        """Return what could not be read, by part."""
        return [self._metrics.left_out, *(made.left_out for made in self._made.values())]

    def rows(self) -> tuple[Metrics, int]:
        """Return the metrics so far, and a number that changes with them."""
        return self._metrics.read(), self._metrics.version

    def now(self, left_out: LeftOut) -> Now:
        """Return what the processes do."""
        return self._statuses.read(left_out)


class View:
    """What one run folder says at one time. Attributes are what `WatchedRun.view` has read."""

    def __init__(self, watched: WatchedRun) -> None:
        run, made = watched.run, watched.made
        self.name = watched.name
        self._watched = watched
        self._unread = LeftOut()
        self.recipe_text, self.recipe = made("recipe", [run.recipe_file], RunFiles.recipe)
        self.versions: Mapping[str, str] = made("versions", [run.versions], RunFiles.versions)
        self.results = made("results", [run.results], RunFiles.results)
        self.responses = made("responses", [run.samples, run.newest], _newest)
        self.measured = made("difficulty", [run.difficulty / "difficulty.json"], RunFiles.difficulty)
        self.metrics, self._version = watched.rows()
        self.now = watched.now(self._unread)
        self.times = made("stages", [run.timings], RunFiles.stages)
        names = dict.fromkeys([*tasks_of(self.metrics), *(r.row.task for r in self.responses)])
        self._of_tasks = tuple(names), tuple(self.results.columns) if self.results else ()
        self.tasks = Tasks(*self._of_tasks)
        self.steps = value_of(self.recipe, "train.steps", int)
        self.done = int(self.metrics[-1]["step"] or 0) + 1 if self.metrics else 0
        self.changes = made("teachers", [run.teachers], RunFiles.teacher_changes)
        self.marks = sorted({change.step for change in self.changes})  # steps from which on a teacher is another one
        self.held_out: Metrics = made("held out", [run.held_out], RunFiles.held_out)
        self.curves: list[dict[str, Any]] = self._cached(
            "curves", lambda _: self._curves(), self._version, watched.version("held out")
        )
        self.difficulty: list[dict[str, Any]] = self._cached(
            "histograms", lambda _: html.difficulty(self.measured, self.tasks), watched.version("difficulty")
        )

    def _cached(self, name: str, build: Callable[[RunFiles], Any], *of: Hashable) -> Any:
        return self._watched.made(name, [], build, self._of_tasks, *of)

    def _curves(self) -> list[dict[str, Any]]:
        charts = curves(self.metrics, self.tasks)
        charts[1:1] = held_out_curves(self.held_out, self.tasks)
        return charts

    def parts(self) -> dict[str, str]:
        """Return the HTML of each part of the page about this run."""
        run, version = self._watched.run, self._watched.version
        ours, report = _macros("watch_parts.html.j2"), _macros("parts.html.j2")
        found = self._watched.made("faults", searched(run.logs), lambda _: faults(run.logs))
        failing = {name: state for name, state in states(run.root).items() if state.failed}
        steps = None if self.now.state == "running" else self.steps
        remarks = verdict.remarks(self.results, self.metrics, steps, 0, self.tasks)
        remarks += verdict.of_teachers(self.changes)
        head = self.headline()
        sentence = html.sentence(self.recipe, self.results, self.metrics, self.tasks, remarks)

        def training(_: RunFiles) -> str:
            many = len(self.metrics)
            last = min(verdict.LAST, many)
            return str(report.training_section(at_the_end(self.metrics), last, many > POINTS, many, self.marks))

        def responses(files: RunFiles) -> str:
            view = html.samples_view(files, self.responses, self.tasks)
            return str(report.responses_section(view, heatmap.FULL_COLOUR))

        settings = report.settings(facts(self.recipe, self.metrics))
        return {
            "verdict": report.verdict_line(sentence) if head["state"] == "done" and self.metrics else "",
            "now": ours.now(head, self._stages()),
            "faults": ours.faults(found, faults_of(self.metrics, METRIC_FAULTS), failing),
            "look": report.to_look_at([remark for remark in remarks if remark.text]),
            "processes": ours.processes(self._ranks(), servers(self.now)),
            "training": self._cached("training", training, self._version, tuple(self.marks)) if self.curves else "",
            "difficulty": report.difficulty_section(len(self.measured), len(self.difficulty))
            if self.difficulty
            else "",
            "responses": self._cached("samples", responses, version("responses")),
            "results": report.results_section(html.results_view(self.results, self.tasks)),
            "settings": settings + report.recipe(short(self.recipe_text, html.RECIPE_LIMIT), self.versions),
            "left-out": report.what_is_left_out(self._left_out()),
        }

    def headline(self) -> dict[str, Any]:
        """Return what the run does now, in a few words, and how far it is."""
        now, launcher = self.now, self.now.launcher
        count, done = (launcher.count, launcher.done) if launcher and launcher.stage else (0, 0)
        text = {
            "unknown": "no launcher has told what it does",
            "running": short(launcher.stage if launcher else "") or "between two stages",
            "silent": f"no sign of life for {html.duration(now.silent)}",
            "done": "finished",
            "failed": "ended early",
        }[now.state]
        state = now.state
        if state == "unknown" and self.results is not None and self._watched.run.report.is_file():
            state, text = "done", "finished"  # by a version that told nothing
        return {
            "state": state,
            "text": text,
            "left": short(launcher.left) if launcher and now.state == "running" else "",
            "note": short(launcher.note, 600) if launcher and now.state in {"running", "silent"} else "",
            "why": launcher.ended if launcher and now.state == "failed" else "",
            "done": done,
            "count": count,
            "share": min(1.0, max(0.0, done / count)) if count > 0 else None,
            "steps": f"{self.done:,} of {self.steps:,} steps" if self.steps else f"{self.done:,} steps",
        }

    def _stages(self) -> list[dict[str, Any]]:
        """Return each stage with its time; the last one may be going on."""
        launcher = self.now.launcher
        times = launcher.seconds if launcher else self.times
        shown = [{"name": short(name), "seconds": seconds, "runs": False} for name, seconds in times.items()]
        if launcher and launcher.stage and launcher.ended != DONE:
            shown.append({"name": short(launcher.stage), "seconds": launcher.elapsed, "runs": True})
        return shown

    def _ranks(self) -> list[dict[str, Any]]:
        shown = []
        for name, (rank, silent) in self.now.ranks.items():
            ended = "" if not rank.ended else "finished" if rank.ended == DONE else short(rank.ended, 300)
            late = "" if silent < 5 else f"; last sign {html.duration(silent)} ago"
            mark = "off" if ended == "finished" else "warning" if ended or late else "good"
            shown.append({"name": name, "does": (ended or short(rank.doing)) + late, "mark": mark})
        return shown

    def _left_out(self) -> list[tuple[str, list[str], int]]:
        return [one for left_out in (*self._watched.left_out(), self._unread) for one in left_out]


def log_lines(run: RunFolder, name: str) -> tuple[list[str], str, list[tuple[str, str]]]:
    """Return the names of the logs, the one that is shown, and its last lines.

    Args:
        run: the run folder.
        name: of a log; if there is none of that name, the first is shown.
    """
    names = log_names(run.logs)
    shown = name if name in names else next(iter(names), "")
    return names, shown, last_lines(run.logs / shown) if shown else []


def digest(value: str) -> str:
    """Return a short digest, by which the page knows what it has already."""
    return hashlib.blake2b(value.encode("utf-8", "replace"), digest_size=6).hexdigest()


def _newest(files: RunFiles) -> list[heatmap.Response]:
    """Return the responses of the newest step that has any."""
    run = files.run
    found = files.responses(html.RESPONSE_TOKENS, run.newest) if run.newest.is_file() else []
    if run.samples.is_file() and (size := run.samples.stat().st_size) > SAMPLES:
        files.left_out.add(run.samples.name, f"{size / 2**20:,.0f} MiB: at most {SAMPLES >> 20} MiB are read")
    else:
        recorded = files.responses(html.RESPONSE_TOKENS)
        found = max(found, recorded, key=_last_step)
    return [r for r in found if r.row.step == _last_step(found)]


def _last_step(responses: Sequence[heatmap.Response]) -> int:
    return max((r.row.step for r in responses), default=-1)


def _macros(name: str) -> Any:
    return html.environment("mmopd.watch").get_template(name).module


def _signature(path: Path) -> tuple[int, int, int] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_ino, about.st_size, about.st_mtime_ns
