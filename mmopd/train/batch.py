"""From the samples of a step to what the trainer is given: tokens with an advantage and a weight.

Letters: N scored samples, M their response tokens, one after the other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mmopd.algorithm.objective import Targets, opd
from mmopd.algorithm.visual import visual_weights
from mmopd.config import Algorithm
from mmopd.records import Encoded, Sample, Score
from mmopd.train.pack import Item


@dataclass(frozen=True, slots=True)
class Batch:
    """The scored samples of a step and their targets."""

    samples: list[Sample]
    spans: list[slice]  # where each sample's tokens lie in the flat [M] arrays
    targets: Targets


def build_batch(samples: Sequence[Sample], settings: Algorithm, seed: int) -> Batch:
    """Balance, calibrate and turn scores into advantages; samples without a score take no part.

    Args:
        samples: of the whole step, over all ranks, in one order on every rank.
        seed: of the balance's draws: (run seed, step).

    Raises:
        ValueError: no sample has a score.
    """
    scored = [s for s in samples if isinstance(s.score, Score)]
    if not scored:
        raise ValueError("no response of this step has a score")
    lengths = torch.tensor([len(s.response.tokens) for s in scored])
    ends = torch.cumsum(lengths, 0).tolist()
    response = torch.repeat_interleave(torch.arange(len(scored)), lengths)
    targets = opd(
        teacher=torch.tensor([x for s in scored for x in _score(s).logprobs]),
        student=torch.tensor([x for s in scored for x in s.response.logprobs]),
        response=response,
        outcome=torch.tensor([s.outcome.value for s in scored]),
        group=torch.tensor([s.group for s in scored]),
        weight=torch.tensor([_score(s).weight for s in scored]),
        settings=settings,
        seed=seed,
    )
    if visual := settings.visual:
        seen = torch.tensor([x for s in scored for x in visual_advantage(s) or [math.nan] * len(s.response.tokens)])
        targets = replace(targets, token_weight=visual_weights(targets.token_weight, seen, response, strength=visual.token_weight))
    return Batch(scored, [slice(e - n, e) for e, n in zip(ends, lengths.tolist(), strict=True)], targets)


def visual_advantage(sample: Sample) -> list[float] | None:
    """[T] log-prob of each token by the teacher with minus without the image, in nats; None unless both scores are there."""
    if not (isinstance(sample.score, Score) and isinstance(sample.blind, Score)):
        return None
    return [seeing - blind for seeing, blind in zip(sample.score.logprobs, sample.blind.logprobs, strict=True)]


def minibatches(batch: Batch, encoded: Sequence[Encoded], n: int) -> list[list[Item]]:
    """What each of at most `n` optimiser steps is given: the kept samples, whole groups dealt in turn.

    The token weights of a minibatch sum to what those of the whole batch sum to: each step is "mean over tokens, then mean over responses".
    """
    kept = [i for i, keep in enumerate(batch.targets.keep.tolist()) if keep]
    turn = {group: k % n for k, group in enumerate(dict.fromkeys(batch.samples[i].group for i in kept))}
    dealt: list[list[int]] = [[] for _ in range(n)]
    for i in kept:
        dealt[turn[batch.samples[i].group]].append(i)
    return [[_item(batch, i, encoded, len(kept) / len(chosen)) for i in chosen] for chosen in dealt if chosen]


def _item(batch: Batch, i: int, encoded: Sequence[Encoded], scale: float) -> Item:
    sample, span = batch.samples[i], batch.spans[i]
    return Item(
        encoded=encoded[sample.group],
        tokens=sample.response.tokens,
        old=torch.tensor(sample.response.logprobs),
        advantage=batch.targets.advantage[span],
        weight=batch.targets.token_weight[span] * scale,
    )


def _score(sample: Sample) -> Score:
    assert isinstance(sample.score, Score)
    return sample.score
