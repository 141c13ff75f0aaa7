"""What loads are replayed on: the model, ranks, limits and costs."""

from __future__ import annotations

from dataclasses import dataclass, field

from llep.errors import SettingsError
from llep.placement import Placement
from llep.planning import PlanOptions
from llep.shapes import ModelShape


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is replayed on: ranks, limits, costs. SettingsError names what is invalid."""

    shape: ModelShape
    num_ranks: int
    slots_per_rank: int = 4
    options: PlanOptions = field(default_factory=PlanOptions)
    window_steps: int = 100  # placements are planned anew after so many steps, from these steps' loads

    def __post_init__(self) -> None:
        if not 1 <= self.num_ranks <= self.shape.num_experts:
            raise SettingsError(
                f"ranks must be between 1 and the number of experts, {self.shape.num_experts}, got {self.num_ranks}",
                param="ranks",
            )
        if not 0 <= self.slots_per_rank <= self.shape.num_experts:
            raise SettingsError(
                f"slots_per_rank must be between 0 and the number of experts, {self.shape.num_experts}, "
                f"got {self.slots_per_rank}",
                param="slots_per_rank",
            )
        if self.window_steps < 1:
            raise SettingsError(f"window_steps must be at least 1, got {self.window_steps}", param="window_steps")

    @property
    def bytes_per_expert(self) -> int:
        """As told, else the model's own, else the cost model's; 0 where nobody knows."""
        model = self.options.cost_model
        return self.options.bytes_per_expert or self.shape.bytes_per_expert or (model.expert_bytes if model else 0)

    @property
    def linear(self) -> Placement:
        return Placement.linear(self.shape.num_experts, self.num_ranks, self.slots_per_rank)
