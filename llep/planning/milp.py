"""Home ranks planned offline, after MoETuner's idea: even loads, and experts that tokens visit in turn close together.

Layers are placed one after the other, each given its neighbours, in sweeps forth and back. A layer's problem is a
mixed-integer program for HiGHS; a greedy answer with swaps stands ready for when the time is up.

Shape letters: L layers, E experts, R ranks.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from llep.placement import Placement

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

SHORTEST_S = 0.05  # less is not worth starting the solver for
BETTER = 1e-9  # by how much a cost must fall to count


@dataclass(frozen=True, slots=True, kw_only=True)
class HomeOptions:
    """What a placement is judged by: imbalance ratio + the weighted shares of traffic. ValueError when invalid."""

    ranks_per_node: int | None = None  # ranks 0..n-1 are node 0 and so on; None: one node
    rank_weight: float = 0.25  # of the share of pairs that go on to another rank; raising it trades balance for that
    node_weight: float = 0.5  # of the share that goes on to another node, on top
    time_limit_s: float = 60.0  # for all layers together; 0 takes the greedy answer
    max_sweeps: int = 4  # forth or back over the layers

    def __post_init__(self) -> None:
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            raise ValueError(f"ranks_per_node must be at least 1, got {self.ranks_per_node}")
        for name in ("rank_weight", "node_weight", "time_limit_s"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number >= 0, got {value}")
        if self.max_sweeps < 1:
            raise ValueError(f"max_sweeps must be at least 1, got {self.max_sweeps}")


@dataclass(frozen=True)
class HomeQuality:
    """A placement in figures; shares are of all pairs of neighbouring layers, 0 where no transitions are known."""

    imbalance_L: tuple[float, ...]
    other_rank_share: float
    other_node_share: float
    cost: float  # mean over layers of what is minimised


@dataclass(frozen=True)
class HomePlan:
    """Home rank of each expert [layers, experts], and how good that is.

    gap_L: how far above the least there is a layer's cost may be, given its neighbours, as a share of it; 0 is proof.
    is_greedy_L: whether the greedy answer stands, because it is as good or because the time was up.
    """

    home_rank_LE: Ids
    gap_L: tuple[float, ...]
    is_greedy_L: tuple[bool, ...]
    before: HomeQuality  # contiguous blocks
    after: HomeQuality


def plan_homes(
    loads_LE: Ids | Floats,
    ep_size: int,
    transitions_LEE: Ids | Floats | None = None,
    options: HomeOptions | None = None,
) -> HomePlan:
    """Home ranks for a window of loads, as many experts on each rank as contiguous blocks would put there.

    transitions_LEE[l, i, j] [layers - 1, experts, experts]: tokens that visited expert i of layer l and then expert j
    of layer l + 1. ValueError for shapes that do not match, negative or non-finite values.
    """
    options = options or HomeOptions()
    loads_LE = np.asarray(loads_LE, dtype=np.float64)
    traffic_LEE = None if transitions_LEE is None else np.asarray(transitions_LEE, dtype=np.float64)
    _check(loads_LE, ep_size, traffic_LEE)
    places = _Places(loads_LE, ep_size, traffic_LEE, options)
    before = places.quality()
    until_s = time.monotonic() + options.time_limit_s
    for layer in range(places.num_layers):
        places.place_greedily(layer)
    for sweep in range(options.max_sweeps):
        layers = range(places.num_layers)
        if not sum(places.improve(layer, until_s, sweep) for layer in (layers if sweep % 2 == 0 else reversed(layers))):
            break
    return HomePlan(places.home_LE, tuple(places.gap_L), tuple(places.is_greedy_L), before, places.quality())


class _Places:
    """Home ranks in the making."""

    def __init__(self, loads_LE: Floats, ep_size: int, traffic_LEE: Floats | None, options: HomeOptions) -> None:
        self.num_layers, num_experts = loads_LE.shape
        linear_E = Placement.linear(num_experts, ep_size, 0).home_rank_E
        self.home_LE = np.tile(linear_E, (self.num_layers, 1))
        self.gap_L = [1.0] * self.num_layers
        self.is_greedy_L = [True] * self.num_layers
        self._room_R = np.bincount(linear_E, minlength=ep_size)
        self._share_LE = loads_LE / np.maximum(loads_LE.sum(axis=1, keepdims=True), 1e-300)
        # Shares of the pairs of two neighbouring layers; half of a pair's cost is each layer's.
        self._traffic_LEE = (
            None
            if traffic_LEE is None
            else traffic_LEE / np.maximum(traffic_LEE.sum(axis=(1, 2), keepdims=True), 1e-300)
        )
        self._node_R = np.arange(ep_size) // (options.ranks_per_node or ep_size)
        self._ep_size, self._options = ep_size, options
        is_other_node = self._node_R[:, None] != self._node_R
        self._distance_RR = options.rank_weight * (1.0 - np.eye(ep_size)) + options.node_weight * is_other_node
        self._solved: dict[int, bytes] = {}  # by layer: the neighbours it was last solved for

    def quality(self) -> HomeQuality:
        ratios = [self._ratio(layer, self.home_LE[layer]) for layer in range(self.num_layers)]
        other_rank = other_node = 0.0
        if self._traffic_LEE is not None and len(self._traffic_LEE):
            for traffic_EE, home_E, next_E in zip(self._traffic_LEE, self.home_LE, self.home_LE[1:], strict=False):
                other_rank += float(traffic_EE[home_E[:, None] != next_E].sum())
                other_node += float(traffic_EE[self._node_R[home_E][:, None] != self._node_R[next_E]].sum())
            other_rank, other_node = other_rank / len(self._traffic_LEE), other_node / len(self._traffic_LEE)
        links = max(self.num_layers - 1, 0) / self.num_layers
        traffic = links * (self._options.rank_weight * other_rank + self._options.node_weight * other_node)
        return HomeQuality(tuple(ratios), other_rank, other_node, float(np.mean(ratios)) + traffic)

    def place_greedily(self, layer: int) -> None:
        """Hottest experts first, each where load and traffic to the layers placed before are least; then swaps."""
        cost_ER = self._cost(layer, is_first=True)
        share_E = self._share_LE[layer]
        loads_R, room_R = np.zeros(self._ep_size), self._room_R.copy()
        for expert in np.argsort(-share_E, kind="stable"):
            costs_R = (loads_R + share_E[expert]) * self._ep_size + cost_ER[expert]
            rank = int(np.where(room_R > 0, costs_R, np.inf).argmin())
            self.home_LE[layer, expert] = rank
            loads_R[rank] += share_E[expert]
            room_R[rank] -= 1
        self._swap(layer, cost_ER)

    def improve(self, layer: int, until_s: float, sweep: int) -> bool:
        """Solve the layer anew for its neighbours as they are now; whether its cost fell."""
        neighbours = self.home_LE[max(layer - 1, 0) : layer + 2].tobytes()
        if self._solved.get(layer) == neighbours:
            return False
        cost_ER = self._cost(layer)
        before = self._cost_of(layer, self.home_LE[layer], cost_ER)
        self._swap(layer, cost_ER)
        left_s = until_s - time.monotonic()
        # An even share of what is left, of this sweep and the ones that may follow.
        share_s = left_s / max(self.num_layers * min(self._options.max_sweeps - sweep, 2) / 2, 1)
        bound = self._bound(layer, cost_ER)
        is_open = self._cost_of(layer, self.home_LE[layer], cost_ER) > bound + BETTER
        if is_open and share_s >= SHORTEST_S:
            bound = max(bound, self._solve(layer, cost_ER, min(share_s, left_s)))
        cost = self._cost_of(layer, self.home_LE[layer], cost_ER)
        self.gap_L[layer] = max((cost - bound) / cost, 0.0)
        self._solved[layer] = self.home_LE[max(layer - 1, 0) : layer + 2].tobytes()
        return cost < before - BETTER

    def _bound(self, layer: int, cost_ER: Floats) -> float:
        """A cost that no placement is below: the hottest expert with the coldest ones, each at its cheapest place."""
        order_E = np.sort(self._share_LE[layer])
        coldest = order_E[: max(int(self._room_R.min()) - 1, 0)].sum()
        return max(float(order_E[-1] + coldest) * self._ep_size, 1.0) + float(cost_ER.min(axis=1).sum())

    def _cost(self, layer: int, *, is_first: bool = False) -> Floats:
        """Traffic cost [E, R] of each expert on each rank, given the neighbours; is_first: only the one before."""
        cost_ER = np.zeros((self.home_LE.shape[1], self._ep_size))
        if self._traffic_LEE is None:
            return cost_ER
        if layer > 0:
            cost_ER += self._traffic_LEE[layer - 1].T @ self._distance_RR[self.home_LE[layer - 1]]
        if layer + 1 < self.num_layers and not is_first:
            cost_ER += self._traffic_LEE[layer] @ self._distance_RR[self.home_LE[layer + 1]]
        return cost_ER

    def _ratio(self, layer: int, home_E: Ids) -> float:
        loads_R = np.bincount(home_E, self._share_LE[layer], self._ep_size)
        return float(loads_R.max() * self._ep_size) if loads_R.any() else 1.0

    def _cost_of(self, layer: int, home_E: Ids, cost_ER: Floats) -> float:
        return self._ratio(layer, home_E) + float(cost_ER[np.arange(len(home_E)), home_E].sum())

    def _swap(self, layer: int, cost_ER: Floats) -> None:
        """Exchange the two experts that lowers the cost most, again and again, until none does."""
        home_E, share_E = self.home_LE[layer], self._share_LE[layer]
        at = np.arange(len(home_E))
        for _ in range(10 * len(home_E)):
            loads_R = np.asarray(np.bincount(home_E, share_E, self._ep_size), dtype=np.float64)
            own_E = cost_ER[at, home_E]
            there_EE = cost_ER[:, home_E]  # cost of the row's expert on the column's rank
            traffic_EE = there_EE + there_EE.T - own_E[:, None] - own_E
            change_EE = share_E[:, None] - share_E  # what moves from the row's rank to the column's
            pair_EE = np.maximum(loads_R[home_E][:, None] - change_EE, loads_R[home_E] + change_EE)
            highest_EE = np.maximum(pair_EE, _highest_of_others(loads_R, home_E))
            gain_EE = traffic_EE + (highest_EE - loads_R.max()) * self._ep_size
            gain_EE[home_E[:, None] == home_E] = 0.0
            best = int(gain_EE.argmin())
            first, second = divmod(best, len(home_E))
            if gain_EE[first, second] >= -BETTER:
                return
            home_E[first], home_E[second] = home_E[second], home_E[first]

    def _solve(self, layer: int, cost_ER: Floats, time_limit_s: float) -> float:
        """Take the solver's answer where it is better; the bound it found.

        One binary for each (expert, rank), and the highest load.
        """
        experts, ranks = cost_ER.shape
        size = experts * ranks
        expert_N, rank_N = np.divmod(np.arange(size), ranks)
        ones = np.ones(size)
        one_home = coo_array((ones, (expert_N, np.arange(size))), shape=(experts, size + 1)).tocsr()
        full = coo_array((ones, (rank_N, np.arange(size))), shape=(ranks, size + 1)).tocsr()
        below = coo_array(
            (
                np.append(self._share_LE[layer][expert_N] * ranks, -np.ones(ranks)),
                (np.append(rank_N, np.arange(ranks)), np.append(np.arange(size), np.full(ranks, size))),
            ),
            shape=(ranks, size + 1),
        ).tocsr()
        found = milp(
            np.append(cost_ER.reshape(-1), 1.0),
            constraints=[
                LinearConstraint(one_home, 1, 1),
                LinearConstraint(full, self._room_R, self._room_R),
                LinearConstraint(below, -np.inf, 0),
            ],
            integrality=np.append(ones, 0),
            bounds=Bounds(0, np.append(ones, np.inf)),
            options={"time_limit": time_limit_s},
        )
        if found.x is not None:
            home_E = found.x[:-1].reshape(experts, ranks).argmax(axis=1)
            if self._cost_of(layer, home_E, cost_ER) < self._cost_of(layer, self.home_LE[layer], cost_ER) - BETTER:
                self.home_LE[layer] = home_E
                self.is_greedy_L[layer] = False
        return 0.0 if found.mip_dual_bound is None else float(found.mip_dual_bound)


def _highest_of_others(loads_R: Floats, home_E: Ids) -> Floats:
    """[E, E]: the highest load of the ranks that are home to neither the row's nor the column's expert."""
    order = np.argsort(-loads_R)[:3]
    highest_EE = np.zeros((len(home_E), len(home_E)))
    is_open_EE = np.ones_like(highest_EE, dtype=bool)
    for rank in order:
        is_free_EE = is_open_EE & (home_E[:, None] != rank) & (home_E != rank)
        highest_EE[is_free_EE] = loads_R[rank]
        is_open_EE &= ~is_free_EE
    return highest_EE


def _check(loads_LE: Floats, ep_size: int, traffic_LEE: Floats | None) -> None:
    if loads_LE.ndim != 2 or not loads_LE.size:
        raise ValueError(f"loads must have shape (layers, experts), got {loads_LE.shape}")
    layers, experts = loads_LE.shape
    if not 1 <= ep_size <= experts:
        raise ValueError(f"ep_size must be between 1 and the number of experts, {experts}, got {ep_size}")
    expected = (layers - 1, experts, experts)
    if traffic_LEE is not None and traffic_LEE.shape != expected:
        raise ValueError(f"transitions must have shape {expected}, got {traffic_LEE.shape}")
    for name, values in (("loads", loads_LE), ("transitions", traffic_LEE)):
        if values is not None and not (np.isfinite(values).all() and (values >= 0).all()):
            raise ValueError(f"{name} must be finite and >= 0")
