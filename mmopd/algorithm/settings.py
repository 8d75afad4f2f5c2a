"""Settings of the algorithm: the objective, and the parts that process a step before it. This module loads no torch."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from mmopd.algorithm.base import Objective
from mmopd.algorithm.objectives import OBJECTIVES, find_objective
from mmopd.algorithm.objectives.opd import OPD
from mmopd.settings_errors import described
from mmopd.settings_file import Config, Fraction, Positive, suggest


class Difficulty(Config):
    """Offline balancing: K answers per prompt, and weights that flatten the histogram (paper 3.3, A.1)."""

    attempts: Positive = Field(
        8,
        description="Answers to each prompt, K. The paper gives no value; 8 gives nine classes of difficulty. The "
        "pass costs K responses for each prompt, once",
    )
    policy: Literal["flatten", "drop_easy", "frontier"] = Field(
        "flatten",
        description="How counts become sampling weights. `flatten` is the paper's. Two others are for comparisons: "
        "`drop_easy` leaves out prompts that are always right (POLARIS), `frontier` weighs by p (1 - p) (PACED)",
    )
    shape: Literal["auto", "u", "mirrored_j", "flat"] = Field(
        "auto",
        description="Shape of the histogram, for `flatten`: `u` raises the weight of the middle, `mirrored_j` that of "
        "all prompts that are not always right, `flat` none. `auto` decides from the counts, as in the paper",
    )
    cap: float = Field(
        4.0,
        ge=1,
        description="Largest sampling weight of a prompt, for `flatten`; an unweighted prompt has 1. 4 limits how "
        "often rare prompts are repeated; it is our choice, the paper gives no value",
    )
    temperature: float = Field(1.0, gt=0, description="Sampling temperature of the pass. 1 as in the paper (A.1)")
    top_p: float = Field(0.95, gt=0, le=1, description="Nucleus share of the pass. 0.95 as in the paper (A.1)")
    top_k: int = Field(50, ge=0, description="Likeliest tokens of the pass, 0 for all. 50 as in the paper (A.1)")


class Balance(Config):
    """Online balancing of right and wrong responses (paper 3.3, A.2)."""

    scope: Literal["group", "batch"] = Field(
        "group",
        description="Responses that are balanced together: each `group` that has right and wrong ones, as in the "
        "authors' scripts, or the whole `batch` of all ranks, as in the paper's text",
    )
    ratio: float = Field(
        1.0,
        ge=0,
        allow_inf_nan=True,  # .inf keeps only right responses
        description="Target ratio of right to wrong responses. 1 as in the paper. For comparisons, 0 keeps only wrong "
        "responses and .inf only right ones",
    )
    tolerance: Fraction = Field(
        0.05,
        description="Allowed distance of the share of right responses from its target, in scope `batch`. 0.05 is our "
        "choice, the paper gives no value. No effect in scope `group`",
    )


OF_ONE_KIND = {"direction": "shift", "retain": "mask"}  # settings of a margin


class Margin(Config):
    """Outcome-guided margin calibration (paper 3.4, A.4): shift or mask."""

    kind: Literal["shift", "mask"] = Field(
        "shift",
        description="How the margin is enforced: `shift` moves the rewards of right or wrong responses, `mask` leaves "
        "out the responses that violate it. The paper's settings use shift",
    )
    scope: Literal["group", "global"] = Field(
        "group",
        description="Responses that share a margin: each prompt's `group`, as in the paper's settings, or `global`, "
        "the batch of all ranks",
    )
    mode: Literal["mean", "minmax"] = Field(
        "mean",
        description="Definition of the margin: `mean` is the mean return of right minus that of wrong responses (the "
        "paper's settings), `minmax` the lowest right minus the highest wrong return (Eq. 9), which is stricter",
    )
    direction: Literal["lift", "suppress", "spread"] = Field(
        "spread",
        description="Responses that shift moves: `lift` raises right ones, `suppress` lowers wrong ones, `spread` does "
        "half of each. The paper uses spread for text and lift for images. An error with `mask`",
    )
    delta: float = Field(
        0.4,
        ge=0,
        description="Target margin between the returns of right and wrong responses, in nats per token. 0.4 as in the "
        "paper's text runs; 0 requires only the right order",
    )
    retain: Fraction = Field(
        0.25,
        description="Smallest share of the right and of the wrong responses that mask keeps. 0.25 as in Algorithm 1 of "
        "the paper; at least one response of each side is kept. An error with `shift`",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_kind(cls, data: Any) -> Any:
        if isinstance(data, list) or (isinstance(data, dict) and {"shift", "mask"} & data.keys()):
            raise ValueError(
                "one calibration at a time: `kind: shift` or `kind: mask`, with its settings next to `kind`"
            )
        if not isinstance(data, dict) or (kind := data.get("kind", "shift")) not in ("shift", "mask"):
            return data
        others = [key for key, owner in OF_ONE_KIND.items() if owner != kind]
        if wrong := next((key for key in others if data.get(key) is not None), None):
            raise ValueError(
                f"`{wrong}` is a setting of `kind: {OF_ONE_KIND[wrong]}`, and the kind is {kind}: "
                f"leave it out, or set algorithm.margin.{wrong}=null"
            )
        return {key: value for key, value in data.items() if key not in others}

    @model_serializer(mode="wrap")
    def _what_its_kind_has(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Write only the settings of this kind, so that the result can be read again."""
        return {key: value for key, value in write(self).items() if OF_ONE_KIND.get(key, self.kind) == self.kind}


class Visual(Config):
    """Visual advantage: how much likelier a teacher finds a response with the image than with a blank one."""

    share: Fraction = Field(
        0.05,
        description="Share of the responses to image prompts that are scored a second time, with a blank image, to "
        "measure the effect of the image. 0.05 costs 5 % more scoring; 0 measures nothing",
    )
    token_weight: float = Field(
        0.0,
        ge=0,
        description="Strength of a token weight for tokens that need the image. 0 switches it off: it is not part of "
        "the paper's recipe. It affects the responses that `share` measures",
    )


def _build_objective(data: object) -> object:
    """Return the settings as the class of their `kind`."""
    if isinstance(data, str):
        raise ValueError(f"expected keys and values, such as `objective: {{kind: {data}}}`")
    if not isinstance(data, Mapping):
        return data
    known = f"there is {', '.join(OBJECTIVES)}, and the files of algorithm/"
    if not isinstance(kind := data.get("kind"), str):
        raise ValueError(
            f"`kind` is missing; {known}" if kind is None else f"`kind` is a name, not {described(kind)}; {known}"
        )
    objective = find_objective(kind)
    for key in data:
        if key not in objective.model_fields:
            near = suggest(str(key), objective.model_fields)
            raise ValueError(f"`{key}` is no setting of `kind: {kind}`{near}")
    return objective.model_validate(data)


class Algorithm(Config):
    """The algorithm: an objective, and the parts that process a step before it; a part that is `null` is off."""

    objective: Annotated[SerializeAsAny[Objective], BeforeValidator(_build_objective)] = OPD()
    difficulty: Difficulty | None = Difficulty()
    balance: Balance | None = Balance()
    margin: Margin | None = Margin()
    visual: Visual | None = Visual()
    clip_low: float = Field(
        0.2, ge=0, lt=1, description="The ratio of new to old policy is clipped at 1 - clip_low. 0.2 as in the paper"
    )
    clip_high: float = Field(
        0.28,
        ge=0,
        description="The ratio of new to old policy is clipped at 1 + clip_high. 0.28 as in the paper: "
        "tokens that become likelier may move a little further",
    )
    ratio_cap: float = Field(
        2.0,
        ge=1,
        description="Largest importance weight of a token, if log-probs are recomputed: its probability by the trainer "
        "divided by that of the engine that sampled it. 2 bounds the variance. No effect with "
        "`train.old_logprobs: engine`",
    )
    log_ratio_clip: float = Field(
        10.0,
        gt=0,
        description="A token whose |log pi_student - log pi_teacher| reaches this, in nats, is left out. 10 as in the"
        " paper; lower it if a few tokens dominate the gradient",
    )
    outcome_threshold: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Outcome at or above which a response counts as right, for soft outcomes between 0 and 1 (A.3). "
        "0.5 is our choice; exact outcomes are 0 or 1",
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_has_no_use(cls, data: Any) -> Any:
        try:
            objective = _build_objective(data.get("objective") if isinstance(data, dict) else None)
        except ValueError:
            return data  # the field's own validator raises it again, with the key's name
        if not isinstance(objective, Objective):
            return data
        for part in objective.unused:
            if data.get(part) is not None:
                raise ValueError(
                    f"`{part}` has no meaning with `objective: {{kind: {objective.kind}}}`: set algorithm.{part}=null"
                )
            data = {**data, part: None}
        return data
