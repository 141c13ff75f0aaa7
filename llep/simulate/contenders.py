"""Planners that can be replayed side by side: llep's own, and its peers with what they remember.

Shape letters: L MoE layers, R ranks, E experts, S slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from llep.config import Settings
from llep.errors import SettingsError
from llep.plan import Plan
from llep.planning import PLANNERS, plan_step
from llep.planning.eplb import plan_eplb
from llep.planning.peers import copies_of, holders_of, plan_even_split, plan_exact, plan_lp_split, plan_optimum
from llep.planning.policy import Step, decide
from llep.planning.replicas import Forecast, Replica, ReplicaLimits, plan_replicas
from llep.simulate.setup import Setup

Counts = npt.NDArray[np.int64]


class Planner(Protocol):
    """A planner under simulation, with state over steps.

    copies_LR: resident copies away from home. moved: copies made so far.
    """

    copies_LR: Counts
    moved: int

    def plan(self, layer: int, counts_RE: Counts, tokens_E: Counts, phase: str) -> Plan: ...

    def plans_batches(self, phase: str) -> bool:
        """Whether something is decided for each batch, which takes time."""

    def seen(self, loads_LE: Counts) -> None:
        """Told after each step, for those that plan placements from windows of loads."""


class StepPlanner:
    """One of llep's step planners over fixed home ranks."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.copies_LR = np.zeros((setup.shape.num_layers, setup.num_ranks), dtype=np.int64)
        self.moved = 0
        self._name = name
        self._placements = [setup.linear] * setup.shape.num_layers
        sized = replace(setup.options, bytes_per_expert=setup.bytes_per_expert)
        self._options = {phase: replace(sized, phase=phase) for phase in ("prefill", "decode")}

    def plan(self, layer: int, counts_RE: Counts, tokens_E: Counts, phase: str) -> Plan:
        return plan_step(self._name, counts_RE, self._placements[layer], self._options[phase])

    def plans_batches(self, phase: str) -> bool:
        return True

    def seen(self, loads_LE: Counts) -> None:
        pass


class SettingsPlanner(StepPlanner):
    """What an engine does under some settings, over fixed home ranks."""

    def __init__(self, settings: Settings, setup: Setup) -> None:
        super().__init__("home", setup)
        self._settings, self._setup = settings, setup

    def plan(self, layer: int, counts_RE: Counts, tokens_E: Counts, phase: str) -> Plan:
        return decide(
            self._settings,
            Step(phase, int(tokens_E.sum()) // self._setup.shape.top_k),
            self._setup.shape.layer_numbers[layer],
            counts_RE,
            self._placements[layer],
            self._setup.bytes_per_expert,
            self._setup.options.ranks_per_node,
            self._setup.options.cost_model,
        )


class ReplicaPlanner(StepPlanner):
    """llep's resident replicas, planned anew after each window; then quota, with the lending pool or without.

    In decode nothing is planned per batch, as under CUDA graphs: an expert's tokens are split evenly over its copies.
    """

    FORECAST_WINDOWS = 10  # the planner's windows in one of ours: it wants to see the spread

    def __init__(self, setup: Setup, copies_per_rank: int, slots_per_rank: int) -> None:
        super().__init__("quota", replace(setup, slots_per_rank=slots_per_rank))
        shape = setup.shape
        size = max(setup.bytes_per_expert, 1)
        budget = copies_per_rank * shape.num_layers * size
        self._limits = ReplicaLimits(budget_bytes=(budget,) * setup.num_ranks, bytes_per_expert=size)
        self._forecast = Forecast.start(shape.num_layers, shape.num_experts)
        self._home_LE = np.tile(setup.linear.home_rank_E, (shape.num_layers, 1))
        self._loads_LE = np.zeros((shape.num_layers, shape.num_experts), dtype=np.int64)
        self._window_steps = setup.window_steps
        self._steps = 0
        self._replicas: tuple[Replica, ...] = ()
        self._copies = [holders_of(placement) for placement in self._placements]

    def plan(self, layer: int, counts_RE: Counts, tokens_E: Counts, phase: str) -> Plan:
        if phase == "decode":
            return plan_even_split(tokens_E, self._copies[layer])
        return super().plan(layer, counts_RE, tokens_E, phase)

    def plans_batches(self, phase: str) -> bool:
        return phase != "decode"

    def seen(self, loads_LE: Counts) -> None:
        self._loads_LE += loads_LE
        self._steps += 1
        if self._steps % max(self._window_steps // self.FORECAST_WINDOWS, 1) == 0:
            self._forecast = self._forecast.seen(self._loads_LE)
            self._loads_LE[:] = 0
        if self._steps % self._window_steps == 0:
            self._place()

    def _place(self) -> None:
        found = plan_replicas(self._forecast, self._home_LE, self._replicas, self._limits)
        self._replicas = found.replicas
        self.moved += len(found.added)
        self.copies_LR[:] = 0
        of_layer: list[list[tuple[int, int]]] = [[] for _ in self._placements]
        for layer, expert, rank in found.replicas:
            of_layer[layer].append((expert, rank))
            self.copies_LR[layer, rank] += 1
        self._placements = [
            replace(placement, replicas=tuple(replicas))
            for placement, replicas in zip(self._placements, of_layer, strict=True)
        ]
        self._copies = [holders_of(placement) for placement in self._placements]


class CopiesPlanner:
    """EPLB's copies, planned anew after each window; tokens split evenly over them, or by LPLB's linear program."""

    def __init__(self, setup: Setup, extra_per_rank: int, split: str) -> None:
        shape, ranks = setup.shape, setup.num_ranks
        if shape.num_experts % ranks:
            raise SettingsError(
                f"eplb and lplb have equally many slots on each rank: the number of experts, {shape.num_experts}, must "
                f"be a multiple of the number of ranks, got {ranks}",
                param="planner",
            )
        self.copies_LR = np.full((shape.num_layers, ranks), extra_per_rank, dtype=np.int64)
        self.moved = 0
        self._num_slots = shape.num_experts + extra_per_rank * ranks
        self._num_ranks, self._split = ranks, split
        self._window_steps, self._steps = setup.window_steps, 0
        self._loads_LE = np.zeros((shape.num_layers, shape.num_experts), dtype=np.int64)
        self._slots_LRS = np.tile(np.arange(shape.num_experts).reshape(ranks, -1), (shape.num_layers, 1, 1))
        start = copies_of(np.arange(shape.num_experts), shape.num_experts, ranks)
        self._copies = [start] * shape.num_layers

    def plan(self, layer: int, counts_RE: Counts, tokens_E: Counts, phase: str) -> Plan:
        return (plan_lp_split if self._split == "lplb" else plan_even_split)(tokens_E, self._copies[layer])

    def plans_batches(self, phase: str) -> bool:
        return self._split == "lplb"

    def seen(self, loads_LE: Counts) -> None:
        self._loads_LE += loads_LE
        self._steps += 1
        if self._steps % self._window_steps == 0:
            self._place()
            self._loads_LE[:] = 0

    def _place(self) -> None:
        layers, num_experts = self._loads_LE.shape
        slots_LS = plan_eplb(self._loads_LE, self._num_slots, self._num_ranks)
        self._copies = [copies_of(slots_S, num_experts, self._num_ranks) for slots_S in slots_LS]
        new_LRS = slots_LS.reshape(layers, self._num_ranks, -1)
        self.moved += sum(
            len(set(new.tolist()) - set(old.tolist()))
            for new_RS, old_RS in zip(new_LRS, self._slots_LRS, strict=True)
            for new, old in zip(new_RS, old_RS, strict=True)
        )
        self._slots_LRS = new_LRS


class ExactPlanner(StepPlanner):
    """MoonEP's exact balance, without a limit of slots."""

    def __init__(self, setup: Setup) -> None:
        super().__init__("home", setup)

    def plan(self, layer: int, counts_RE: Counts, tokens_E: Counts, phase: str) -> Plan:
        return plan_exact(tokens_E, self._placements[layer])


class OptimumPlanner(StepPlanner):
    """The least highest load within the limits, by mixed-integer programming."""

    LIMIT_S = 10.0
    LARGEST = 512  # (expert, rank) pairs

    def __init__(self, setup: Setup) -> None:
        super().__init__("home", setup)
        size = setup.num_ranks * setup.shape.num_experts
        if size > self.LARGEST:
            raise SettingsError(
                f"optimum is for small cases: ranks x experts must be at most {self.LARGEST}, got {size}",
                param="planner",
            )

    def plan(self, layer: int, counts_RE: Counts, tokens_E: Counts, phase: str) -> Plan:
        return plan_optimum(tokens_E, self._placements[layer], self._options[phase], self.LIMIT_S).plan


# Name -> (what it is, how it is made from a setup and the K of a name such as eplb+K).
PEERS: Mapping[str, tuple[str, Callable[[Setup, int], Planner]]] = {
    "eplb": ("DeepSeek's EPLB on windows, K more slots per rank", lambda s, k: CopiesPlanner(s, k, "eplb")),
    "lplb": ("the same copies, each batch split by linear programming", lambda s, k: CopiesPlanner(s, k, "lplb")),
    "replicas": ("llep's resident replicas, K per rank and layer on average", lambda s, k: ReplicaPlanner(s, k, 0)),
    "quota": ("quota, lending on top of K resident replicas", lambda s, k: ReplicaPlanner(s, k, s.slots_per_rank)),
    "exact": ("MoonEP's exact balance, slots without limit", lambda s, k: ExactPlanner(s)),
    "optimum": ("the least highest load, by MILP: small cases", lambda s, k: OptimumPlanner(s)),
}
TAKES_COPIES = ("eplb", "lplb", "replicas", "quota")


def make_planner(name: str, setup: Setup) -> Planner:
    """The planner of that name: home, least_loaded, quota, exact, optimum, or eplb+K, lplb+K, replicas+K, quota+K."""
    base, plus, number = name.partition("+")
    known = [*PLANNERS, *(peer for peer in PEERS if peer not in PLANNERS)]
    if base not in known or (plus and base not in TAKES_COPIES):
        raise SettingsError(
            f"planner={name!r} is unknown; choose from {', '.join(known)}; "
            f"{', '.join(f'{peer}+K' for peer in TAKES_COPIES)} have K copies per rank",
            param="planner",
        )
    if plus and not number.isdecimal():
        raise SettingsError(f"planner={name!r}: what follows + must be a number of copies per rank", param="planner")
    if base in PLANNERS and not plus:
        return StepPlanner(base, setup)
    return PEERS[base][1](setup, int(number or 0))
