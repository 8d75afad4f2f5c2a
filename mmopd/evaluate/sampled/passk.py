"""pass@k of n responses (paper Eq. 15)."""

import math

from mmopd.errors import ConfigError


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the probability that k of n responses, drawn without replacement, have a right one (Eq. 15).

    Args:
        right: number of right responses, c in the equation.

    Raises:
        ConfigError: k is larger than n, so that there is no estimate.
    """
    if not 1 <= k <= n:
        raise ConfigError(f"pass@{k} needs at least {k} responses to each problem, and there are {n}")
    return 1 - math.comb(n - right, k) / math.comb(n, k)
