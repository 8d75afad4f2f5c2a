"""pass@k of n responses (paper Eq. 15), and its mean over problems with a standard error."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

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


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean over problems and its standard error; no error for a single problem.

    The responses to a problem are alike, so that the spread of problems, and not of responses, decides the error.
    """
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
