"""On-policy distillation as the trainer sees it: an advantage and a weight per token (paper 3.2, Algorithm 3). OPD,
ExOPD, Uni-OPD.

The order is the paper's: online balance, returns of what was kept, margins, shift or mask. Every rank calls `opd` on
the responses of all ranks and gets the same arrays; the trainer takes its share and knows no more of the algorithm than
`clipped_loss`. N responses with a score, M tokens of all of them.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmopd.algorithm.balance import balance_online
from mmopd.algorithm.groups import first, same_length, sides
from mmopd.algorithm.margin import margin_mask, margin_shift, margins
from mmopd.config import Algorithm, Margin


@dataclass(frozen=True, slots=True)
class Targets:
    """What the update needs of a step, and what a person wants to see of it."""

    advantage: Float[Tensor, " M"]  # of OPD the calibrated token reward, in nats
    token_weight: Float[
        Tensor, " M"
    ]  # w_k / (T_i * kept responses of the step), T_i the tokens that count; 0 = leaves the loss
    keep: Bool[Tensor, " N"]
    diagnostics: dict[str, float]  # a number that this step does not have (no group with both outcomes, say) has no key
    log_ratio: Float[Tensor, " N"] | None = (
        None  # log pi_T - log pi_theta, summed over the tokens that count, where there is a teacher
    )
    counted: Int[Tensor, " N"] | None = None  # how many tokens that is


def opd(
    teacher: Float[Tensor, " M"],
    student: Float[Tensor, " M"],
    response: Int[Tensor, " M"],
    *,
    outcome: Float[Tensor, " N"],
    group: Int[Tensor, " N"],
    weight: Float[Tensor, " N"],
    settings: Algorithm,
    seed: int,
    reference: Float[Tensor, " M"] | None = None,
    scale: float = 1.0,
) -> Targets:
    """Reverse KL on the student's own tokens (Eq. 2, 3), balanced and calibrated as `settings` say.

    The reward of a token is `log pi_T - log pi_theta`; with a reference, `scale (log pi_T - log pi_ref) - (log pi_theta
    - log pi_ref)` (ExOPD), which goes on past the teacher in the direction in which it has left the reference. A token
    where teacher and student are `log_ratio_clip` or more apart leaves the loss and its response's return. A response
    with no other token (or none at all) is treated like one without a score: it takes part in nothing. If no outcome is
    known, balance and margins have nothing to do, and this is plain OPD.

    Args:
        teacher: log-prob of each sampled token, in nats, by the teacher of its prompt.
        student: the same by the policy that sampled it.
        response: which response the token belongs to, 0..N-1.
        outcome: 1 right, 0 wrong, between cut at `outcome_threshold`, NaN unknown.
        group: number of the response's prompt, over all ranks.
        weight: w_k of the teacher that scored the response (Eq. 4); of several, the mean by their shares.
        settings: the parts that are on, and their numbers.
        seed: of the run and the step.
        reference: log-prob of each sampled token by the reference.
        scale: lambda; at 1 the reference has no part in the reward.

    Raises:
        ValueError: a log-prob that is NaN or infinite, with the token and its response; an outcome outside 0..1; a
            weight that is negative or not finite; lengths that differ.
    """
    same_length(teacher=teacher, student=student, response=response)
    same_length(outcome=outcome, group=group, weight=weight)
    _check_tokens(response, len(outcome), teacher=teacher, student=student)
    if (bad := ~(weight.isfinite() & (weight >= 0))).any():
        raise ValueError(f"weight[{first(bad)}] is {weight[bad][0]:g}: expected a number >= 0")
    N, cut = len(outcome), settings.outcome_threshold
    reward = log_ratio = teacher - student
    left_out = log_ratio.abs() >= settings.log_ratio_clip
    if reference is not None:
        same_length(teacher=teacher, reference=reference)
        _check_tokens(response, N, reference=reference)
        reward = log_ratio + (scale - 1) * (teacher - reference)
    T = torch.bincount(response, minlength=N) - torch.bincount(response[left_out], minlength=N)  # [N] tokens that count
    log_ratios = _sums(log_ratio, left_out, response, N)
    returns = (log_ratios if reference is None else _sums(reward, left_out, response, N)) / T.clamp(min=1)

    scored = T > 0
    balanced = scored.clone()
    if b := settings.balance:
        balanced[scored] = balance_online(
            outcome[scored],
            group[scored],
            scope=b.scope,
            ratio=b.ratio,
            tolerance=b.tolerance,
            seed=seed,
            threshold=cut,
        )
    keep, shift, advantage = balanced.clone(), torch.zeros_like(returns), reward
    if m := settings.margin:
        R, o, g = returns[balanced], outcome[balanced], group[balanced]
        if m.kind == "shift":
            shift[balanced] = margin_shift(
                R, o, g, scope=m.scope, mode=m.mode, direction=m.direction, delta=m.delta, threshold=cut
            )
            advantage = (
                shift.to(reward.dtype).index_select(0, response).add_(reward)
            )  # five times as fast as shift[response]
        else:
            keep[balanced] = margin_mask(
                R, o, g, scope=m.scope, mode=m.mode, delta=m.delta, retain=m.retain, threshold=cut
            )

    share = torch.where(keep, weight / (T.clamp(min=1) * keep.sum().clamp(min=1)), 0.0)
    return Targets(
        advantage=advantage,
        token_weight=share.to(reward.dtype).index_select(0, response).masked_fill_(left_out, 0.0),
        keep=keep,
        log_ratio=log_ratios,
        counted=T,
        diagnostics=_tokens_seen(log_ratios, T, len(response))
        | _responses_seen(outcome, cut, returns, scored=scored, balanced=balanced, keep=keep, shift=shift)
        | _order_seen(
            "before", returns[balanced], outcome[balanced], group[balanced], margin=settings.margin, threshold=cut
        )
        | _order_seen(
            "after", (returns + shift)[keep], outcome[keep], group[keep], margin=settings.margin, threshold=cut
        ),
    )


def clipped_loss(
    logprob: Float[Tensor, " M"],
    old: Float[Tensor, " M"],
    advantage: Float[Tensor, " M"],
    weight: Float[Tensor, " M"],
    *,
    clip_low: float,
    clip_high: float,
) -> Float[Tensor, ""]:
    """`-sum weight * min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)`, rho = pi_theta / pi_old (PPO, recipe of the
    paper).

    The weights of `opd` hold the mean over a response's tokens and the mean over the responses of all ranks, so the
    sums of micro-batches and ranks add up to the loss. A token of weight 0 has no part in it, whatever its log-probs
    are.
    """
    rho = torch.where(weight != 0, logprob - old, 0.0).exp()
    gain = torch.minimum(rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage)
    return -(weight * gain).sum()


def _check_tokens(response: Tensor, responses: int, **logprobs: Tensor) -> None:
    for name, logprob in logprobs.items():
        # The sum first: it is ten times as fast as asking each of millions.
        if not logprob.sum().isfinite() and not (finite := logprob.isfinite()).all():
            i = first(~finite)
            raise ValueError(
                f"{name} log-prob of token {i} (response {response[i]}) is {logprob[i]:g}: such a score is absent, leave it out"
            )
    stray = (response < 0) | (response >= responses)
    if stray.any():
        raise ValueError(f"response[{first(stray)}] is {response[stray][0]}, but there are {responses} responses")


def _sums(value: Tensor, left_out: Tensor, response: Tensor, responses: int) -> Tensor:
    """Of the tokens that count of each response; float64 [N]."""
    return torch.bincount(response, weights=value.masked_fill(left_out, 0.0).double(), minlength=responses)


def _tokens_seen(log_ratios: Tensor, counting: Tensor, tokens: int) -> dict[str, float]:
    """Reverse KL is the mean of -r over the tokens that count, of all responses: what balancing keeps is no sample of
    the student.
    """
    counted = int(counting.sum())
    seen = {"token_clipped_share": 1 - counted / tokens} if tokens else {}
    return seen | ({"reverse_kl": -float(log_ratios.sum()) / counted} if counted else {})


def _responses_seen(
    outcome: Tensor, threshold: float, returns: Tensor, *, scored: Tensor, balanced: Tensor, keep: Tensor, shift: Tensor
) -> dict[str, float]:
    right, wrong = sides(outcome, threshold)
    known = right | wrong
    return {"responses": float(len(keep)), "responses_kept": float(keep.sum())} | _means(
        kept_share=keep,
        empty_share=~scored,
        balanced_away_share=scored & ~balanced,
        masked_share=balanced & ~keep,
        unknown_share=~known,
        correct_share=right[known],
        correct_share_kept=right[known & keep],
        return_mean=returns[scored],
        return_right=returns[right & scored],
        return_wrong=returns[wrong & scored],
        shift_mean=shift[keep].abs(),
    )


def _order_seen(
    when: str, returns: Tensor, outcome: Tensor, group: Tensor, *, margin: Margin | None, threshold: float
) -> dict[str, float]:
    """Order consistency (Fig. 5) of the prompts with both outcomes: share with margin >= 0 and >= delta, and the
    margins themselves.

    By prompt, whatever the scope of the calibration; the mode is the calibration's, or mean.
    """
    margin_S = margins(
        returns, outcome, group, scope="group", mode=margin.mode if margin else "mean", threshold=threshold
    )
    seen = {f"two_sided_groups_{when}": float(len(margin_S))}
    seen |= _means(**{f"margin_{when}": margin_S, f"order_{when}": margin_S >= 0})
    if margin:
        seen |= _means(
            **{f"order_delta_{when}": margin_S >= margin.delta - 1e-9}
        )  # a shift reaches delta up to rounding
    if len(margin_S):
        seen |= {f"margin_p{q}_{when}": float(margin_S.quantile(q / 100)) for q in (10, 50, 90)}
    return seen


def _means(**values: Tensor) -> dict[str, float]:
    """The mean of each; what is empty has none and is left out."""
    return {name: float(value.double().mean()) for name, value in values.items() if len(value)}
