"""Settings of the algorithm: the objective, and the parts that work on a step before it. Loads no torch."""

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
from mmopd.settings_file import Config, Fraction, Positive, suggest


class Difficulty(Config):
    """Offline balancing: K answers per prompt, and weights that flatten the histogram (paper 3.3, A.1)."""

    attempts: Positive = 8
    policy: Literal["flatten", "drop_easy", "frontier"] = Field(
        "flatten",
        description="the paper's; or to compare: without the always right ones (POLARIS), or weighted by p (1 - p) "
        "(PACED)",
    )
    shape: Literal["auto", "u", "mirrored_j", "flat"] = Field("auto", description="of the histogram, for flatten")
    cap: float = Field(4.0, ge=1, description="largest sampling weight of a prompt, for flatten")
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)
    top_k: int = Field(50, ge=0)


class Balance(Config):
    """Online balancing of right and wrong responses (paper 3.3, A.2)."""

    scope: Literal["group", "batch"] = "group"
    ratio: float = Field(
        1.0, ge=0, description="right : wrong to reach; 1 is the paper's 1 : 1, 0 and .inf ask for one side alone"
    )
    tolerance: Fraction = Field(
        0.05, description="allowed distance of the share of right ones, in scope batch; no use in scope group"
    )


OF_ONE_KIND = {"direction": "shift", "retain": "mask"}  # settings of a margin


class Margin(Config):
    """Outcome-guided margin calibration (paper 3.4, A.4): one of shift or mask."""

    kind: Literal["shift", "mask"] = "shift"
    scope: Literal["group", "global"] = "group"
    mode: Literal["mean", "minmax"] = "mean"
    direction: Literal["lift", "suppress", "spread"] = Field(
        "spread", description="of shift; an error where mask is asked for"
    )
    delta: float = Field(0.4, ge=0, allow_inf_nan=False, description="margin to reach, in nats")
    retain: Fraction = Field(
        0.25, description="share of a side that mask always keeps; an error where shift is asked for"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_kind(cls, data: Any) -> Any:
        if isinstance(data, list) or (isinstance(data, dict) and {"shift", "mask"} & data.keys()):
            raise ValueError("one calibration at a time: `kind: shift` or `kind: mask`, with its settings beside it")
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
        """So that what is written reads back."""
        return {key: value for key, value in write(self).items() if OF_ONE_KIND.get(key, self.kind) == self.kind}


class Visual(Config):
    """Visual advantage: how much more likely a response is to a teacher that sees the image than to one that is shown a
    blank.
    """

    share: Fraction = Field(
        0.05, description="share of the responses to image prompts that are scored a second time, without the image"
    )
    token_weight: float = Field(
        0.0, ge=0, description="strength of a token weight that favours tokens that need the image; 0 = off"
    )


def _build_objective(data: object) -> object:
    """Return the settings as the class of their `kind`."""
    if isinstance(data, str):
        raise ValueError(f"expected keys and values, such as `objective: {{kind: {data}}}`")
    if not isinstance(data, Mapping):
        return data
    if not isinstance(kind := data.get("kind"), str):
        raise ValueError(f"`kind` is missing; there is {', '.join(OBJECTIVES)}, and the files of algorithm/")
    objective = find_objective(kind)
    for key in data:
        if key not in objective.model_fields:
            known = suggest(str(key), objective.model_fields)
            raise ValueError(f"`{key}` is no setting of `kind: {kind}`{known}")
    return objective.model_validate(data)


class Algorithm(Config):
    """What the student learns from its responses; a part that is `null` is switched off."""

    objective: Annotated[SerializeAsAny[Objective], BeforeValidator(_build_objective)] = OPD()
    difficulty: Difficulty | None = Difficulty()
    balance: Balance | None = Balance()
    margin: Margin | None = Margin()
    visual: Visual | None = Visual()
    clip_low: float = Field(0.2, ge=0, lt=1, description="pi / pi_old is clipped at 1 - this, and at 1 + clip_high")
    clip_high: float = Field(0.28, ge=0)
    ratio_cap: float = Field(
        2.0,
        ge=1,
        description="largest weight that a token gets for being likelier now than when it was sampled, with recomputed "
        "log-probs",
    )
    log_ratio_clip: float = Field(
        10.0, gt=0, description="a token whose |log pi_student - log pi_teacher| reaches it is left out"
    )
    outcome_threshold: float = Field(0.5, gt=0, le=1, description="a soft outcome at or above it counts as right")

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
