"""Several optimiser steps on one rollout batch: which responses are in each, and what they add up to."""

import torch

from mmopd.algorithm import Tokens
from mmopd.algorithm.settings import Algorithm
from mmopd.modality import Encoder
from mmopd.records import Absent, Encoded, Outcome, Prompt, Response, Sample, Score
from mmopd.train.batch import Batch, build_batch, minibatches
from mmopd.train.prefix_tree import Item

SIZES = (3, 1, 4, 2, 2)  # responses of each prompt
PLAIN = Algorithm(balance=None, margin=None, visual=None)


def a_batch() -> Batch:
    """Return five groups, not in order, with an unscored response, a response whose tokens are all left out, and
    teachers of different weight.
    """
    random = torch.Generator().manual_seed(0)
    samples = []
    for k, group in enumerate([4, *(g for g, n in enumerate(SIZES) for _ in range(n - (g == 4)))]):
        logprobs = torch.randn(2, 1 + k % 4, generator=random) - 2
        student, teacher = (tuple(row.tolist()) for row in logprobs)
        tokens = tuple(range(100 * k, 100 * k + len(student)))
        if k == 5:
            teacher = tuple(x - PLAIN.log_ratio_clip for x in student)
        score = Absent("t", "timeout") if k == 2 else Score("t", teacher, weight=1.0 + group)
        samples.append(
            Sample(
                group, Response(tokens, student, "", "stop", (("step-0", len(tokens)),)), Outcome(float(k % 2)), score
            )
        )
    return build_batch(samples, PLAIN, 0)


def prompts(encoder: Encoder) -> list[Encoded]:
    asked = [Prompt(f"s/{g}", "t", "text", ({"role": "user", "content": f"{g}+1"},), (), "") for g in range(len(SIZES))]
    return [encoder.encode(prompt) for prompt in asked]


def loss(items: list[Item], moved: dict[tuple[int, ...], torch.Tensor]) -> torch.Tensor:
    """Compute the loss as the trainer does, for a policy whose log-probs are now `moved`."""
    old, A, w = (torch.cat([getattr(item, name) for item in items]) for name in ("old", "advantage", "weight"))
    tokens = Tokens(torch.cat([moved[item.tokens] for item in items]), old, A, w, likeliest=None)
    return PLAIN.objective.loss(tokens, PLAIN)


def test_whole_groups_are_dealt_and_every_kept_response_is_in_one_minibatch(encoder: Encoder) -> None:
    batch = a_batch()
    kept = {s.response.tokens for s, keep in zip(batch.samples, batch.targets.keep.tolist(), strict=True) if keep}
    assert len(kept) == sum(SIZES) - 2
    for n in range(1, 8):
        dealt = minibatches(batch, prompts(encoder), n)
        assert len(dealt) == min(n, len(SIZES))  # none is empty
        tokens = [item.tokens for items in dealt for item in items]
        assert len(tokens) == len(kept)
        assert set(tokens) == kept
        groups = [{item.encoded.prompt.key for item in items} for items in dealt]
        assert sum(map(len, groups)) == len(set().union(*groups)) == len(SIZES)
        assert max(map(len, groups)) - min(map(len, groups)) <= 1
        for item in (item for items in dealt for item in items):
            i = next(i for i, sample in enumerate(batch.samples) if sample.response.tokens == item.tokens)
            assert item.encoded.prompt.key == f"s/{batch.samples[i].group}"
            assert torch.equal(item.advantage, batch.targets.advantage[batch.spans[i]])
            assert torch.equal(item.old, batch.old[batch.spans[i]])


def test_each_minibatch_is_a_mean_over_its_responses_and_their_mean_is_the_whole_batch(encoder: Encoder) -> None:
    batch = a_batch()
    (whole,) = minibatches(batch, prompts(encoder), 1)
    random = torch.Generator().manual_seed(1)
    moved = {i.tokens: (i.old + 0.3 * torch.randn(len(i.tokens), generator=random)).requires_grad_() for i in whole}
    total = loss(whole, moved)
    expected = torch.autograd.grad(total, list(moved.values()))
    for n in (2, 3, 5):
        dealt = minibatches(batch, prompts(encoder), n)
        for items in dealt:
            for item in items:  # w_k / (T N), N the responses of this optimiser step
                w = 1.0 + int(item.encoded.prompt.key[2:])
                torch.testing.assert_close(
                    item.weight, torch.full((len(item.tokens),), w / len(item.tokens) / len(items))
                )
        mean = sum(len(items) / len(whole) * loss(items, moved) for items in dealt)
        torch.testing.assert_close(mean, total)
        for ours, theirs in zip(torch.autograd.grad(mean, list(moved.values())), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
