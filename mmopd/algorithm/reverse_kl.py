"""On-policy distillation as an advantage and a weight per token (paper 3.2, Algorithm 3): OPD, ExOPD, Uni-OPD.

The order is the paper's: online balance, returns of the kept responses, margins, shift or mask. Every rank calls `opd`
on the responses of all ranks and gets the same arrays; the trainer takes its share, and knows nothing of the algorithm
but the loss. N responses with a score, M tokens of all of them.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmopd.algorithm.balance import balance_online
from mmopd.algorithm.groups import first, same_length, sides
from mmopd.algorithm.margin import margin_mask, margin_shift, margins
from mmopd.algorithm.settings import Algorithm, Margin
from mmopd.algorithm.step import Step, Targets, mean_weights


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
    """Return reverse KL targets on the student's own tokens (Eq. 2, 3), balanced and calibrated as `settings` say.

    The reward of a token is `log pi_T - log pi_theta`. With a reference it is `scale (log pi_T - log pi_ref) - (log
    pi_theta - log pi_ref)` (ExOPD), which goes past the teacher in the direction from the reference to the teacher. A
    token where teacher and student are `log_ratio_clip` or more apart leaves the loss and its response's return. A
    response with no other token (or none at all) is treated like one without a score: it takes part in nothing. If no
    outcome is known, balance and margins have nothing to do, and this is plain OPD.

    Args:
        teacher: log-prob of each sampled token, in nats, by the teacher of its prompt.
        student: the same by the policy that sampled it.
        response: which response the token belongs to, 0..N-1.
        outcome: 1 right, 0 wrong, between cut at `outcome_threshold`, NaN unknown.
        group: number of the response's prompt, over all ranks.
        weight: w_k of the teacher that scored the response (Eq. 4); for several teachers, the mean by their shares.
        settings: the parts that are on, and their values.
        seed: of the run and the step.
        reference: log-prob of each sampled token by the reference.
        scale: lambda; at 1 the reference has no effect on the reward.

    Raises:
        ValueError: a log-prob that is NaN or infinite, with the token and its response; an outcome outside 0..1; a
            weight that is negative or not finite; lengths that differ.
    """
    same_length(teacher=teacher, student=student, response=response)
    same_length(outcome=outcome, group=group, weight=weight)
    _check_tokens(response, len(outcome), teacher=teacher, student=student)
    if (bad := ~(weight.isfinite() & (weight >= 0))).any():
        raise ValueError(f"weight[{first(bad)}] is {weight[bad][0]:g}: expected a number >= 0")
    N = len(outcome)
    cut = settings.outcome_threshold
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
    balanced, keep, shift = _calibrated(returns, scored, outcome, group, settings=settings, seed=seed)
    advantage = reward
    if settings.margin and settings.margin.kind == "shift":  # index_select is five times as fast as shift[response]
        advantage = shift.to(reward.dtype).index_select(0, response).add_(reward)
    share = mean_weights(T, keep, weight)
    seen = _tokens_seen(log_ratios, T, len(response))
    seen |= _responses_seen(outcome, cut, returns, scored=scored, balanced=balanced, keep=keep, shift=shift)
    for when, some, R in (("before", balanced, returns), ("after", keep, returns + shift)):
        seen |= _order_seen(when, R[some], outcome[some], group[some], margin=settings.margin, threshold=cut)
    return Targets(
        advantage=advantage,
        token_weight=share.to(reward.dtype).index_select(0, response).masked_fill_(left_out, 0.0),
        keep=keep,
        log_ratio=log_ratios,
        counted=T,
        diagnostics=seen,
    )


def targets_of(step: Step, scale: float = 1.0) -> Targets:
    """Return `opd` of a step with teachers' scores."""
    assert step.teacher is not None
    return opd(
        step.teacher,
        step.student,
        step.response,
        outcome=step.outcome,
        group=step.group,
        weight=step.weight,
        settings=step.settings,
        seed=step.seed,
        reference=step.reference,
        scale=scale,
    )


def _calibrated(
    returns: Tensor, scored: Tensor, outcome: Tensor, group: Tensor, *, settings: Algorithm, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (balanced, keep, shift), each [N].

    These are what balancing keeps, what the mask keeps of it, and what each token of a response gains.
    """
    cut = settings.outcome_threshold
    balanced = scored.clone()
    shift = torch.zeros_like(returns)
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
    keep = balanced.clone()
    if m := settings.margin:
        R = returns[balanced]
        o = outcome[balanced]
        g = group[balanced]
        if m.kind == "shift":
            shift[balanced] = margin_shift(
                R, o, g, scope=m.scope, mode=m.mode, direction=m.direction, delta=m.delta, threshold=cut
            )
        else:
            keep[balanced] = margin_mask(
                R, o, g, scope=m.scope, mode=m.mode, delta=m.delta, retain=m.retain, threshold=cut
            )
    return balanced, keep, shift


def _check_tokens(response: Tensor, responses: int, **logprobs: Tensor) -> None:
    for name, logprob in logprobs.items():
        # The sum first: it is ten times as fast as a check of each of millions.
        if not logprob.sum().isfinite() and not (finite := logprob.isfinite()).all():
            i = first(~finite)
            raise ValueError(
                f"{name} log-prob of token {i} (response {response[i]}) is {logprob[i]:g}: such a score is absent, "
                "leave it out"
            )
    stray = (response < 0) | (response >= responses)
    if stray.any():
        raise ValueError(f"response[{first(stray)}] is {response[stray][0]}, but there are {responses} responses")


def _sums(value: Tensor, left_out: Tensor, response: Tensor, responses: int) -> Tensor:
    """Return the sum over the counted tokens of each response; float64 [N]."""
    counting = value.masked_fill(left_out, 0.0).double()
    return torch.bincount(
        response, weights=counting, minlength=responses
    ).double()  # without tokens bincount returns int64


def _tokens_seen(log_ratios: Tensor, counting: Tensor, tokens: int) -> dict[str, float]:
    """Return the share of clipped tokens, and reverse KL: the mean of -r over the counted tokens.

    All responses count: those that balancing keeps are not a sample of the student.
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
    """Return the order consistency (Fig. 5) of prompts with both outcomes, and statistics of their margins.

    Order consistency is the share with margin >= 0 and >= delta. Margins are by prompt, whatever the scope of the
    calibration; their mode is that of the calibration, or mean.
    """
    margin_S = margins(
        returns, outcome, group, scope="group", mode=margin.mode if margin else "mean", threshold=threshold
    )
    seen = {f"two_sided_groups_{when}": float(len(margin_S))}
    seen |= _means(**{f"margin_{when}": margin_S, f"order_{when}": margin_S >= 0})
    if margin:
        # A shift reaches delta up to rounding.
        seen |= _means(**{f"order_delta_{when}": margin_S >= margin.delta - 1e-9})
    if len(margin_S):
        seen |= {f"margin_p{q}_{when}": float(margin_S.quantile(q / 100)) for q in (10, 50, 90)}
    return seen


def _means(**values: Tensor) -> dict[str, float]:
    """Return the mean of each; empty values are left out."""
    return {name: float(value.double().mean()) for name, value in values.items() if len(value)}
