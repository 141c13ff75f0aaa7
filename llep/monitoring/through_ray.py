"""Names of metrics that come through Ray's agents."""

from __future__ import annotations

import re

_OURS = re.compile(r"(?<![\w:])llep_\w+")


def through_ray(expr: str) -> str:
    """The expression, asking for what Ray's agents show: ray_ and our name. Recorded names stay."""
    return _OURS.sub(r"ray_\g<0>", expr)
