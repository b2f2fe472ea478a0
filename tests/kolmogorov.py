"""The Kolmogorov-Smirnov test of draws against a distribution function."""

from collections.abc import Callable

import torch
from torch import Tensor


def p_value(values: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """How likely draws of the distribution function `cdf` are as far from it as `values`, `[n]`.

    Kolmogorov's limit with Stephens' correction for finite n; good for n of a hundred and more.
    """
    found = values.double().sort().values
    size = len(found)
    want = cdf(found)
    above = torch.arange(1, size + 1, dtype=torch.float64) / size - want
    below = want - torch.arange(size, dtype=torch.float64) / size
    distance = max(above.max().item(), below.max().item())
    scaled = distance * (size**0.5 + 0.12 + 0.11 / size**0.5)
    terms = torch.arange(1, 101, dtype=torch.float64)
    series = 2 * ((-1) ** (terms - 1) * torch.exp(-2 * terms**2 * scaled**2)).sum()
    return min(1.0, max(0.0, series.item())) if scaled > 0.2 else 1.0
