"""What becomes of a gradient that is stale when its turn comes: --staleness."""

from __future__ import annotations

import dataclasses
import math
import re

from headwater.protos.errors import UsageError

DEFAULT_LAMBDA = 0.04
"""Of `compensate`: what DC-ASGD-c used for CIFAR-10."""


@dataclasses.dataclass(frozen=True)
class StalenessPolicy:
    """What becomes of a gradient with staleness τ that the dial lets in.

        none          w += update(g)
        scale         w += update(g) / (1 + τ)              Zhang et al. 2016
        compensate:λ  w += update(g + λ·g·g·(w - w_base))   Zheng et al. 2017
        drop:K        τ > K: refused, and its batch computed anew

    Sources: Zhang, Gupta, Lian and Liu 2016, "Staleness-aware Async-SGD for
    Distributed Deep Learning", with 1 + τ for their τ, which counts from 1; Zheng
    et al. 2017, "Asynchronous Stochastic Gradient Descent with Delay
    Compensation" (DC-ASGD-c). For complex parameters g·g is |g|².
    """

    scale: bool = False
    compensate: float | None = None
    drop: int | None = None

    @classmethod
    def parse(cls, text: str, name: str = "--staleness") -> StalenessPolicy:
        """Read `none`, `scale`, `compensate`, `compensate:L` or `drop:K`.

        Raises:
          UsageError: It is none of them; names `name`.
        """
        if text in ("none", "scale"):
            return cls(scale=text == "scale")
        if match := re.fullmatch(r"compensate(?::(\d+(?:\.\d+)?(?:e[+-]?\d+)?))?", text):
            strength = float(match[1] or DEFAULT_LAMBDA)
            if math.isfinite(strength):
                return cls(compensate=strength)
        if match := re.fullmatch(r"drop:(\d{1,9})", text):
            return cls(drop=int(match[1]))
        raise UsageError(
            f"{name} {text!r}: it is none; scale; compensate or compensate:LAMBDA, such as "
            f"compensate:{DEFAULT_LAMBDA}; or drop:K, with K versions of staleness allowed"
        )

    def __str__(self) -> str:
        if self.scale:
            return "scale"
        if self.compensate is not None:
            return f"compensate:{self.compensate!r}".removesuffix(".0")
        return "none" if self.drop is None else f"drop:{self.drop}"
