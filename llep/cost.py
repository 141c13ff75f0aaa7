"""What a plan costs: predicted seconds of compute, transfer and planning."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CostModel:
    """Measured or published costs of one device."""

    name: str
