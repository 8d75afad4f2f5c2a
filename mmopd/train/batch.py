"""Turn the samples of a step into what the trainer needs: tokens with an advantage and a weight.

Letters: N scored samples, M their response tokens, one sample after the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmopd.algorithm.divergence import NOTHING
from mmopd.algorithm.settings import Algorithm
from mmopd.algorithm.step import Step, Targets
from mmopd.algorithm.visual import visual_weights
from mmopd.records import Encoded, Sample, Score
from mmopd.train.prefix_tree import Item


@dataclass(frozen=True, slots=True)
class Batch:
    """The samples of a step that the objective can use, with their targets."""

    samples: list[Sample]
    spans: list[slice]  # where each sample's tokens lie in the flat [M] arrays
    targets: Targets
    old: Tensor  # [M] log-probs by the student before its update


def build_batch(
    samples: Sequence[Sample], settings: Algorithm, seed: int, old: Sequence[Tensor] | None = None
) -> Batch:
    """Return the batch that the objective makes of a step; a sample whose score is missing is left out.

    Args:
        samples: those of the whole step, over all ranks, in the same order on every rank.
        seed: seeds the draws of the balance; made from (run seed, step).
        old: log-probs [T] of each sample's tokens by the trainer, to be used instead of the engine's. Each token then
            has the weight `min(pi_old / pi_engine, ratio_cap)` (truncated importance sampling).

    Raises:
        ValueError: no sample has what the objective needs.
    """
    objective = settings.objective
    chosen = [i for i, s in enumerate(samples) if isinstance(s.score, Score) or not objective.needs_teachers]
    if not chosen:
        raise ValueError("no response of this step has a score")
    usable = [samples[i] for i in chosen]
    sampled = torch.tensor([x for s in usable for x in s.response.logprobs])
    lengths = torch.tensor([len(s.response.tokens) for s in usable])
    step = _step(usable, lengths, sampled if old is None else torch.cat([old[i] for i in chosen]), settings, seed)
    targets = objective.targets(step)
    weight = targets.token_weight
    if visual := settings.visual:
        seen = torch.tensor([x for s in usable for x in visual_advantage(s) or [math.nan] * len(s.response.tokens)])
        weight = visual_weights(weight, seen, step.response, strength=visual.token_weight)
    if old is not None:
        weight = weight * (step.student - sampled).exp().clamp(max=settings.ratio_cap)
    ends = torch.cumsum(lengths, 0).tolist()
    spans = [slice(e - n, e) for e, n in zip(ends, lengths.tolist(), strict=True)]
    return Batch(usable, spans, replace(targets, token_weight=weight), step.student)


def _step(usable: Sequence[Sample], lengths: Tensor, student: Tensor, settings: Algorithm, seed: int) -> Step:
    """Return the flat arrays of a step.

    Args:
        lengths: tokens of each response, [N].
        student: log-probs of the policy that learns, [M].
    """
    scores = [_scored(s.score) for s in usable] if settings.objective.needs_teachers else None
    references = [_scored(s.reference) for s in usable] if settings.objective.references() is not None else None
    return Step(
        response=torch.repeat_interleave(torch.arange(len(usable)), lengths),
        student=student,
        teacher=None if scores is None else torch.tensor([x for score in scores for x in score.logprobs]),
        reference=None if references is None else torch.tensor([x for score in references for x in score.logprobs]),
        outcome=torch.tensor([s.outcome.value for s in usable]),
        group=torch.tensor([s.group for s in usable]),
        weight=torch.ones(len(usable)) if scores is None else torch.tensor([score.weight for score in scores]),
        settings=settings,
        seed=seed,
    )


def visual_advantage(sample: Sample) -> list[float] | None:
    """Return [T] log-prob by the teacher with minus without the image, in nats; None unless both scores exist."""
    if not (isinstance(sample.score, Score) and isinstance(sample.blind, Score)):
        return None
    return [seeing - blind for seeing, blind in zip(sample.score.logprobs, sample.blind.logprobs, strict=True)]


def minibatches(batch: Batch, encoded: Sequence[Encoded], n: int) -> list[list[Item]]:
    """Return the items of each optimiser step, `n` steps at most: the kept samples, whole groups dealt out in turn.

    Weights are scaled to the step: "mean over tokens, then mean over its responses". A small step counts in full.
    """
    kept = [i for i, keep in enumerate(batch.targets.keep.tolist()) if keep]
    turn = {group: k % n for k, group in enumerate(dict.fromkeys(batch.samples[i].group for i in kept))}
    dealt: list[list[int]] = [[] for _ in range(n)]
    for i in kept:
        dealt[turn[batch.samples[i].group]].append(i)
    tops = [sample.score.top for sample in batch.samples if isinstance(sample.score, Score) and sample.score.top]
    k = max((len(at) for top in tops for at in top), default=0)
    return [[_item(batch, i, encoded, len(kept) / len(chosen), k) for i in chosen] for chosen in dealt if chosen]


def _item(batch: Batch, i: int, encoded: Sequence[Encoded], scale: float, k: int) -> Item:
    sample = batch.samples[i]
    span = batch.spans[i]
    return Item(
        encoded=encoded[sample.group],
        tokens=sample.response.tokens,
        old=batch.old[span],
        advantage=batch.targets.advantage[span],
        weight=batch.targets.token_weight[span] * scale,
        likeliest=_likeliest(sample, k),
    )


def _likeliest(sample: Sample, k: int) -> tuple[Tensor, Tensor] | None:
    """Return (ids [T, K], log-probs [T, K]) of the likeliest tokens that the teacher listed, if any.

    If fewer than K of them are in the student's vocabulary, the other places have id 0 and the log-prob `NOTHING`.
    """
    if not isinstance(sample.score, Score) or sample.score.top is None:
        return None
    rows = [[*at.items(), *[(0, NOTHING)] * (k - len(at))] for at in sample.score.top]
    ids = torch.tensor([[token for token, _ in row] for row in rows], dtype=torch.long).reshape(len(rows), k)
    return ids, torch.tensor([[logprob for _, logprob in row] for row in rows]).reshape(len(rows), k)


def _scored(score: object) -> Score:
    assert isinstance(score, Score)
    return score
