"""Visual advantage: the effect of the image on each token of a response.

`v_t = log pi_T(y_t | with the image) - log pi_T(y_t | without)`, in nats, by the same teacher on the same text. Without
means that every image is an even grey of its size. N responses, M tokens of all of them.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmopd.algorithm.groups import at_least_zero, same_length

CAP = 3.0  # nats; e^3: 20 times likelier with the image has the full effect


def visual_weights(
    weight: Float[Tensor, " M"],
    advantage: Float[Tensor, " M"],
    response: Int[Tensor, " M"],
    *,
    strength: float,
    cap: float = CAP,
) -> Float[Tensor, " M"]:
    """Return token weights that favour tokens that need the image; the total weight of a response does not change.

    `w'_t = w_t g_t sum_s(w_s) / sum_s(w_s g_s)` with `g_t = 1 + strength * clip(v_t, 0, cap)`, the sums over the tokens
    of the response. A token that is likelier without the image (v_t < 0) is not punished, only not favoured.

    Args:
        weight: of each token in the loss, >= 0.
        advantage: v_t; NaN for every token of a response that was not scored without the image: its weights stay the
            same bit by bit.
        response: which response the token belongs to.
        strength: 0 returns the weights themselves.

    Raises:
        ValueError: lengths that differ, or a strength or cap below 0.
    """
    same_length(weight=weight, advantage=advantage, response=response)
    at_least_zero("strength", strength)
    at_least_zero("cap", cap)
    if strength == 0:
        return weight
    gain = torch.where(advantage.isnan(), 1.0, 1 + strength * advantage.double().clamp(0, cap))
    N = int(response.max()) + 1 if len(response) else 0
    before = torch.bincount(response, weights=weight.double(), minlength=N)
    after = torch.bincount(response, weights=weight * gain, minlength=N)
    scale = torch.where(after > 0, before / after, 1.0)  # if no token counts, there is nothing to scale
    return (weight * gain * scale[response]).to(weight.dtype)
