"""What a service promises: bounds that 99 of 100 requests, and 99 of 100 tokens, are to keep."""

import math
import re
from dataclasses import dataclass

from lorasrv.errors import ConfigurationError

SHARE = 0.99
_UNITS = {"s": 1.0, "ms": 1e-3}


@dataclass(frozen=True, kw_only=True)
class Slo:
    """Bounds of the 99th percentiles: of the time to the first token, and between two tokens of a request."""

    ttft_s: float = math.inf
    itl_s: float = math.inf

    def __post_init__(self) -> None:
        for name, bound in (("ttft", self.ttft_s), ("itl", self.itl_s)):
            if not bound > 0:
                raise ConfigurationError(f"{name} is {bound}s; it must be > 0")

    def __str__(self) -> str:
        bounds = (("ttft", self.ttft_s), ("itl", self.itl_s))
        return ",".join(f"{name}={bound * 1000:g}ms" for name, bound in bounds if bound != math.inf) or "none"


def parse_slo(text: str) -> Slo:
    """`ttft=500ms,itl=50ms`, either left out or not. Raises ConfigurationError."""
    bounds: dict[str, float] = {}
    for item in text.split(","):
        match = re.fullmatch(r"\s*(ttft|itl)=(\d+(?:\.\d+)?)(ms|s)\s*", item)
        if match is None or match[1] in bounds:
            raise ConfigurationError(f"slo {item!r} must be ttft=TIME or itl=TIME, each once, TIME as 500ms or 0.5s")
        bounds[match[1]] = float(match[2]) * _UNITS[match[3]]
    return Slo(**{f"{name}_s": bound for name, bound in bounds.items()})
