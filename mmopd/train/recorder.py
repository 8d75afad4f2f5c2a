"""Record a step: its metrics (metrics.jsonl) and, in a few steps, some responses token by token (samples.jsonl)."""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from types import TracebackType
from typing import Any, Self

import psutil
import torch

from mmopd.algorithm.settings import Algorithm
from mmopd.algorithm.step import Targets
from mmopd.modality import Encoder
from mmopd.records import Absent, Encoded, Sample, Score
from mmopd.report.heatmap import as_json, token_row
from mmopd.report.loggers.state import states
from mmopd.report.metrics import JsonLines, MetricsWriter
from mmopd.runtime.run_folder import RunFolder, step_of
from mmopd.runtime.status import replace
from mmopd.train.batch import Batch, visual_advantage

WHERE = ("kept", "balanced_away", "masked", "absent", "unknown")  # where a response may end up
SHOWN = 6  # responses of each task that are written token by token ...
SHOWN_TIMES = 4  # ... this many times in a run, first and last step included
NEWEST = 2  # responses of each task among the newest ones, for `mmopd watch` ...
NEWEST_EVERY = 10.0  # ... written after a step if the last ones are as many seconds old


class Recorder:
    """Writes the metrics and the samples of a run; only one rank has a recorder.

    Args:
        steps: of the whole run.
        done: steps of the checkpoint that the run continues from; what was written for later steps is removed.
    """

    def __init__(self, run: RunFolder, algorithm: Algorithm, encoder: Encoder, *, steps: int, done: int) -> None:
        self._run = run.root
        self._metrics = MetricsWriter(run.metrics, done)
        self._samples = JsonLines(run.samples, done)
        self._newest = run.newest
        self._newest_at = 0.0  # when they are written again, on the monotonic clock
        self._encoder = encoder
        last = steps - 1
        self._shown_at = {round(i * last / (SHOWN_TIMES - 1)) for i in range(SHOWN_TIMES)}
        self._threshold = algorithm.outcome_threshold
        self._on_policy = algorithm.objective.samples_rollouts

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._samples.close()

    def step(
        self,
        step: int,
        prompts: Sequence[Encoded],
        samples: Sequence[Sample],
        batch: Batch,
        *,
        updates: Sequence[Mapping[str, float]],
        more: Mapping[str, float],
    ) -> None:
        """Write the metrics of a step, and in some steps a few samples.

        Args:
            prompts: by group.
            updates: what the trainer returned for each optimiser step.
            more: times, the probe, and other metrics that `mmopd.report.metrics` names.
        """
        metrics = sampled(samples)
        if self._on_policy:
            metrics |= (
                accuracy(prompts, samples, self._threshold) | entropy(samples) | {"staleness": staleness(samples, step)}
            )
        metrics |= visual(prompts, samples) | divergence(prompts, batch) | calibration(batch.targets)
        metrics |= {f"share/{name}": metrics[name] / len(samples) for name in WHERE if name in metrics}
        if updates:
            names = ("loss", "grad_norm", "lr", "clip_fraction", "packing", "sharing")
            metrics |= {name: fmean(u[name] for u in updates) for name in names}
            metrics |= {name: updates[0][name] for name in ("mismatch", "mismatch_mean")}
            metrics["trained_tokens"] = sum(u["tokens"] for u in updates)
        metrics |= more
        metrics |= memory()
        metrics |= {f"loggers/failed/{name}": float(s.failed) for name, s in states(self._run).items() if s.failed}
        if batch.targets.log_ratio is not None:
            self._show(step, prompts, batch)
        self._metrics.write(step, metrics)  # last: a reader that finds the step finds its samples, too

    def _show(self, step: int, prompts: Sequence[Encoded], batch: Batch) -> None:
        """Write a few responses of each task: to the samples in some steps, as the newest ones every few seconds."""
        if step in self._shown_at:
            for row in self._rows(step, prompts, batch, SHOWN):
                self._samples.append(row)
        if (now := time.monotonic()) >= self._newest_at:
            rows = self._rows(step, prompts, batch, NEWEST)
            replace(self._newest, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            self._newest_at = now + NEWEST_EVERY

    def _rows(self, step: int, prompts: Sequence[Encoded], batch: Batch, number: int) -> Iterator[dict[str, Any]]:
        """Yield `number` responses of each task token by token."""
        for i in shown(prompts, batch.samples, self._threshold, number):
            sample = batch.samples[i]
            texts = [self._encoder.tokenizer.decode([token]) for token in sample.response.tokens]
            advantage = batch.targets.advantage[batch.spans[i]].tolist()
            keep = bool(batch.targets.keep[i])
            prompt = prompts[sample.group].prompt
            needed = visual_advantage(sample)
            yield as_json(token_row(step, prompt, sample, texts, advantage, kept=keep, visual=needed))


def memory() -> dict[str, float]:
    """Return the memory in use in GiB: of this process, of the whole machine, and of this process's GPU [not run]."""
    host = psutil.virtual_memory()
    used = {
        "memory/rank0": float(psutil.Process().memory_info().rss),
        "memory/host": float(host.total - host.available),
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        used["memory/gpu"] = float(total - free)
    return {name: value / 2**30 for name, value in used.items()}


def shown(prompts: Sequence[Encoded], samples: Sequence[Sample], threshold: float, number: int = SHOWN) -> list[int]:
    """Return the indices of `number` samples of each task, each of another prompt.

    Wrong, right and unknown ones are taken in turn, so that wrong ones are there as long as there are any. Those that
    are also scored without the image come first.
    """
    queues: dict[str, dict[str, list[int]]] = defaultdict(lambda: {"wrong": [], "right": [], "unknown": []})
    for i in sorted(range(len(samples)), key=lambda i: visual_advantage(samples[i]) is None):
        outcome = samples[i].outcome
        verdict = "unknown" if not outcome.known else "right" if outcome.value >= threshold else "wrong"
        queues[prompts[samples[i].group].prompt.task][verdict].append(i)
    chosen: list[int] = []
    for queue in queues.values():
        groups: set[int] = set()
        while len(groups) < number and any(queue.values()):
            for verdict, waiting in queue.items():
                queue[verdict] = [i for i in waiting if samples[i].group not in groups]
                if queue[verdict] and len(groups) < number:
                    chosen.append(queue[verdict].pop(0))
                    groups.add(samples[chosen[-1]].group)
    return chosen


def sampled(samples: Sequence[Sample]) -> dict[str, float]:
    """Return statistics of the samples, with the causes of unknown outcomes and absent scores."""
    unknown = Counter(s.outcome.cause for s in samples if not s.outcome.known)
    absent = Counter(s.score.cause for s in samples if isinstance(s.score, Absent))
    return {
        "responses": float(len(samples)),
        "response_length": fmean(len(s.response.tokens) for s in samples),
        "truncated": fmean(s.response.finish == "length" for s in samples),
        "unknown": float(unknown.total()),
        **{f"unknown/{cause}": float(n) for cause, n in unknown.items()},
        "absent": float(absent.total()),
        **{f"absent/{cause}": float(n) for cause, n in absent.items()},
    }


def accuracy(prompts: Sequence[Encoded], samples: Sequence[Sample], threshold: float) -> dict[str, float]:
    """Return the share of right answers among those that could be judged, overall and by task."""
    right: dict[str, list[bool]] = defaultdict(list)
    for sample in samples:
        if sample.outcome.known:
            right[prompts[sample.group].prompt.task].append(sample.outcome.value >= threshold)
    if not right:
        return {}
    by_task = {f"accuracy/{task}": fmean(known) for task, known in sorted(right.items())}
    return {"correct/sampled": fmean(known for task in right.values() for known in task)} | by_task


def entropy(samples: Sequence[Sample]) -> dict[str, float]:
    """Return an entropy estimate from the log-probs of the sampled tokens; no whole distribution is available."""
    tokens = sum(len(sample.response.tokens) for sample in samples)
    return {"entropy_estimate": -sum(sum(sample.response.logprobs) for sample in samples) / tokens} if tokens else {}


def staleness(samples: Sequence[Sample], step: int) -> float:
    """Return the mean age of the tokens: updates between the weights that sampled them and those that learn."""
    ages = Counter[str]()
    for sample in samples:
        ages.update(dict(sample.response.versions))
    return sum(tokens * (step - step_of(version)) for version, tokens in ages.items()) / max(1, ages.total())


def divergence(prompts: Sequence[Encoded], batch: Batch) -> dict[str, float]:
    """Return the reverse KL of each task and of each teacher over the counted tokens; empty without a teacher."""
    targets = batch.targets
    if targets.log_ratio is None or targets.counted is None:
        return {}
    nats: dict[str, float] = defaultdict(float)
    tokens: Counter[str] = Counter()
    for sample, log_ratio, counted in zip(
        batch.samples, targets.log_ratio.tolist(), targets.counted.tolist(), strict=True
    ):
        assert isinstance(sample.score, Score)
        for name in (f"reverse_kl/{prompts[sample.group].prompt.task}", f"reverse_kl_teacher/{sample.score.teacher}"):
            nats[name] -= log_ratio
            tokens[name] += counted
    return {name: nats[name] / n for name, n in sorted(tokens.items()) if n}


def visual(prompts: Sequence[Encoded], samples: Sequence[Sample]) -> dict[str, float]:
    """Return the effect of the image on the responses that were also scored without it; empty if none was."""
    asked = [sample for sample in samples if sample.blind is not None]
    if not asked:
        return {}
    means: dict[str, list[float]] = defaultdict(list)
    for sample in asked:
        if needed := visual_advantage(sample):
            means[prompts[sample.group].prompt.task].append(fmean(needed))
    scored = sum(map(len, means.values()))
    counts = {"scored_blind": float(scored), "absent_blind": float(len(asked) - scored)}
    return counts | {f"visual_advantage/{task}": fmean(values) for task, values in sorted(means.items())}


def calibration(targets: Targets) -> dict[str, float]:
    """Return the diagnostics of the objective under the names of `mmopd.report.metrics`, as far as the step has them.

    Names that begin with `objective/` stay as they are.
    """
    seen = targets.diagnostics
    shares = {"balanced_away": "balanced_away_share", "masked": "masked_share"}
    counts = {name: round(seen[share] * len(targets.keep)) for name, share in shares.items() if share in seen}
    names = {
        "correct_share_kept": "correct/kept",
        "return_mean": "return",
        "return_right": "return/right",
        "return_wrong": "return/wrong",
        "reverse_kl": "reverse_kl",
        "token_clipped_share": "token_clipped",
        "shift_mean": "shift",
        **{f"order_{when}": f"order_consistency/{when}" for when in ("before", "after")},
        **{f"order_delta_{when}": f"order_delta/{when}" for when in ("before", "after")},
        **{f"two_sided_groups_{when}": f"two_sided_groups/{when}" for when in ("before", "after")},
        **{f"margin_{when}": f"margin/{when}" for when in ("before", "after")},
        **{f"margin_p{q}_{when}": f"margin/p{q}_{when}" for q in (10, 50, 90) for when in ("before", "after")},
    }
    found = {"kept": float(targets.keep.sum()), **counts}
    found |= {ours: seen[theirs] for theirs, ours in names.items() if theirs in seen}
    return found | {name: value for name, value in seen.items() if name.startswith("objective/")}
