"""An engine of a few layers whose ranks are told one revision after the other: settings, placements, weights anew.

What each rank is told, and when, follows from one seed; directives reach every rank at a time of its own.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from llep.config import Mode, Settings
from llep.messages import PROTOCOL, Directive, PlacementOrder
from llep.moe.agreement import CLOCK_US, HEADER_SIZE, WEIGHTS, AgreedSettings, agreed_step
from llep.moe.captured import DeviceMap, compute_captured
from llep.moe.layer import Counts, Group, LeastLoadedMoE
from llep.moe.replicas import PlacedLayer, Replicas, Room
from llep.moe.workspace import Workspace
from llep.placement import Placement
from llep.plan import Plan, check_plan, home_segments
from llep.planning.policy import Step, decide, needs_counts, plans_replicas
from tests.layers import ChosenSwiglu, all_weights, make_layer_on, reference, routed_tokens

EXPERTS, LAYERS, SLOTS, ROOM = 12, 3, 2, 4
BYTES_PER_S = 20 << 20  # about a copy per millisecond
MOST_DELAY = 3  # steps after which a directive has reached every rank
REASONS = {
    "unknown layer": (LAYERS, 0, 1),
    "unknown expert": (0, EXPERTS, 1),
    "unknown rank": (0, 0, 99),
    "a copy at home": (0, 0, 0),
}


@dataclass(frozen=True)
class Told:
    """One revision, at which step it sets out, and why it must be refused, if it must."""

    step: int
    directive: Directive
    refusal: str = ""


@dataclass
class Found:
    """What one rank saw. live: (revision, placement, copies in place) of each step. captured: pairs of captured steps
    that this rank computed, [at home, in its room]."""

    worst: float = 0.0
    live: list[tuple[int, int, int]] = field(default_factory=list)
    decisions: Counter[str] = field(default_factory=Counter)
    refusals: list[str] = field(default_factory=list)
    captured: list[int] = field(default_factory=lambda: [0, 0])


def script(seed: int, changes: int, size: int, steps_per_change: int = 6) -> list[Told]:
    """Revisions 1, 2, ...: random settings; for every second another placement, an older one again, or none."""
    rng = random.Random(seed)
    order: PlacementOrder | None = None
    older: list[PlacementOrder | None] = [None]
    told = []
    for number in range(1, changes + 1):
        wanted, refusal = order, ""
        if rng.random() < 0.6:
            replicas = random_replicas(rng, size)
            if rng.random() < 0.3:
                before = rng.choice(older)
                replicas = () if before is None else before.replicas
            if rng.random() < 0.15:
                refusal, replicas = spoiled(rng, replicas, size)
            wanted = PlacementOrder(number, replicas, BYTES_PER_S) if replicas else None
        if not refusal:
            order = wanted
            older.append(order)
        directive = Directive(
            protocol=PROTOCOL, engine="e", revision=number, settings=random_settings(rng), placement=wanted
        )
        told.append(Told(number * steps_per_change, directive, refusal))
    return told


def random_settings(rng: random.Random) -> dict[str, Any]:
    return {
        "mode": rng.choices(list(Mode), weights=(1, 1, 1, 9))[0].value,
        "planner": rng.choices(("quota", "least_loaded", "home"), weights=(5, 3, 1))[0],
        "imbalance_threshold": rng.choice((1.0, 1.05, 1.3)),
        "min_chunk_tokens": rng.choice((1, 1, 8)),
        "min_batch_tokens": rng.choice((0, 0, 40, 1000)),
        "phases": rng.choice(("both", "both", "prefill", "decode")),
        "layers": rng.choice(("all", "all", "0,2")),
        "probe_ratio": rng.choice((0.0, 0.3)),
    }


def random_replicas(rng: random.Random, size: int) -> tuple[tuple[int, int, int], ...]:
    room = [rng.randint(0, ROOM) for _ in range(size)]
    replicas = []
    for rank, rows in enumerate(room):
        away = [(layer, e, rank) for layer in range(LAYERS) for e in range(EXPERTS) if home_of(e, size) != rank]
        replicas += rng.sample(away, rows)
    return tuple(replicas)


def spoiled(
    rng: random.Random, replicas: tuple[tuple[int, int, int], ...], size: int
) -> tuple[str, tuple[tuple[int, int, int], ...]]:
    """(why it must be refused, a placement that can't be followed)."""
    kind = rng.choice((*REASONS, "more copies than room", "doubles"))
    if kind in REASONS:
        return kind, (*replicas, REASONS[kind])
    expert = next(e for e in range(EXPERTS) if home_of(e, size) == 0)
    if kind == "doubles":
        return kind, ((0, expert, 1), (0, expert, 1))
    away = [e for e in range(EXPERTS) if home_of(e, size) != 1]
    return kind, tuple((layer, e, 1) for layer in range(LAYERS) for e in away)[: ROOM + 1]


def home_of(expert: int, size: int) -> int:
    return Placement.linear(EXPERTS, size, 0).home_rank[expert]


class Rank:
    """One rank of the engine, as llep.vllm_plugin.rank is one of vLLM's."""

    def __init__(self, transport: Group, seed: int, *, is_replicated: bool) -> None:
        self.transport, self.is_replicated = transport, is_replicated
        self.replicas = Replicas(transport)
        self.agreed = AgreedSettings(Settings(), self.replicas.check)
        self.found = Found()
        self.weights = 0
        self.seed = seed
        home = Placement.linear(EXPERTS, transport.size, SLOTS)
        room: Room | None = None
        for layer in range(LAYERS):
            moe = make_layer_on(transport, home.home_rank, SLOTS, Workspace(4096, 4096), seed=self._weights_seed(layer))
            room = room or Room.reserve(moe.experts.weights, ROOM)
            device_map = DeviceMap(home, moe.local_ids, transport.rank, ROOM, transport.device)
            self.replicas.add_layer(moe, home, room, device_map)

    def load_weights(self) -> None:
        """Other weights, in the tensors where the old ones were."""
        self.weights += 1
        self.replicas.home_only()
        for layer, placed in enumerate(self.replicas.layers):
            mine = [e for e, home in enumerate(placed.home.home_rank) if home == self.transport.rank]
            new = all_weights(EXPERTS, self._weights_seed(layer))
            for tensor, whole in zip(placed.moe.experts.weights.values(), new, strict=True):
                tensor.copy_(whole[mine])

    def _weights_seed(self, layer: int) -> int:
        return 1000 * self.weights + layer

    def offer(self, told: Told) -> None:
        held, said = self.agreed.held.number, self.agreed.last_error
        self.agreed.offer(told.directive)
        if told.refusal and told.directive.revision > held:
            assert self.agreed.held.number == held, f"{told.refusal}: was not refused"
            assert told.refusal in self.agreed.last_error != said, (told.refusal, self.agreed.last_error)
            self.found.refusals.append(self.agreed.last_error)

    def step(self, number: int) -> None:
        """One forward pass through all layers; every rank enters it."""
        shared = np.random.default_rng([self.seed, number])
        is_prefill = bool(shared.random() < 0.6)
        sizes = shared.integers(0, 40 if is_prefill else 4, size=self.transport.size)
        sizes[shared.random(self.transport.size) < 0.3] = 0
        tokens = int(sizes[0 if self.is_replicated else self.transport.rank])
        is_dummy = not tokens and bool(number % 2) and not self.is_replicated
        header = self.agreed.header(
            number, tokens, is_dummy=is_dummy, is_prefill=is_prefill and tokens > 0, weights=self.weights
        )
        rows = self.transport.gather(torch.from_numpy(header).to(self.transport.device), "agreement on the step")
        headers = rows.cpu().numpy().reshape(-1, HEADER_SIZE)
        self.agreed.agree(headers)
        live = self.agreed.live
        self.replicas.follow(
            live.placement,
            headers[0, CLOCK_US] / 1e6,
            headers[:, WEIGHTS].tolist(),
            may_fill=live.settings.mode is Mode.ACTIVE,
        )
        self.replicas.map_captured(live.number, self._acts)
        step, _ = agreed_step(headers, is_replicated=self.is_replicated)
        for layer, placed in enumerate(self.replicas.layers):
            hot = [int(expert) for expert in shared.choice(EXPERTS, size=2, replace=False)]
            rng = np.random.default_rng([self.seed, number, layer, 0 if self.is_replicated else self.transport.rank])
            batch = routed_tokens(rng, tokens, EXPERTS, hot, float(shared.random()))
            self._run_layer(layer, placed, number, step, batch)
        self.found.live.append((live.number, self.replicas.live_number, self.replicas.filled))

    def captured_step(self, number: int) -> None:
        """One that a CUDA graph would replay: nothing is agreed on before it, and every rank has all tokens."""
        shared = np.random.default_rng([self.seed, number, 1])
        for layer, placed in enumerate(self.replicas.layers):
            batch = routed_tokens(shared, int(shared.integers(1, 30)), EXPERTS, [0, 1], 0.5)
            on_device = tuple(tensor.to(self.transport.device) for tensor in batch)
            experts, device_map = placed.moe.experts, placed.device_map
            assert isinstance(experts, ChosenSwiglu) and device_map is not None
            output = compute_captured(experts, placed.room.bank, device_map, *on_device)
            rows = device_map.rows(on_device[2])
            for place, bank in enumerate((experts.weights, placed.room.bank)):
                self.found.captured[place] += int((rows[place] < len(bank["down"])).sum())
            self.transport.add_up(output, "outputs")
            self._compare(output.cpu(), reference(*batch, EXPERTS, self._weights_seed(layer)))

    def _acts(self, layer: int, placement: Placement) -> bool:
        settings = self.agreed.live.settings
        return settings.mode is Mode.ACTIVE and plans_replicas(settings, layer, placement)

    def _compare(self, output: torch.Tensor, expected: torch.Tensor) -> None:
        if len(expected):
            self.found.worst = max(self.found.worst, float((output - expected).abs().max() / expected.abs().max()))

    def _run_layer(
        self, layer: int, placed: PlacedLayer, number: int, step: Step, batch: tuple[torch.Tensor, ...]
    ) -> None:
        settings = self.agreed.live.settings
        moe: LeastLoadedMoE = placed.moe
        on_device = tuple(tensor.to(self.transport.device) for tensor in batch)
        self.transport.where = f"step {number}, layer {layer}"
        choose = partial(self._decide, placed, layer, step, is_probe=number % 3 == 0 and settings.probe_ratio > 0)
        if self.is_replicated:
            agree = needs_counts(settings, step, layer, placed.placement)
            output = moe.forward_replicated(*on_device, choose, agree=agree).output_TH
            self.transport.add_up(output, "outputs")
        else:
            output = moe.forward_sharded(*on_device, choose).output_TH
        expected = reference(*batch, EXPERTS, self._weights_seed(layer))
        self._compare(output.cpu(), expected)

    def _decide(self, placed: PlacedLayer, layer: int, step: Step, counts_QE: Counts, *, is_probe: bool) -> Plan:
        counts_RE = np.zeros((self.transport.size, EXPERTS), np.int64)
        counts_RE[: len(counts_QE)] = counts_QE
        settings = self.agreed.live.settings
        plan = decide(settings, step, layer, counts_RE, placed.placement, placed.bytes_per_expert, is_probe=is_probe)
        check_plan(plan, counts_RE.sum(axis=0).tolist())
        if settings.mode is Mode.SHADOW:
            return Plan(plan.decision, plan.placement, _at_home(counts_RE, placed.home))
        self.found.decisions[plan.decision.value] += 1
        return plan


def _at_home(counts_RE: Counts, home: Placement) -> np.ndarray[Any, np.dtype[np.int64]]:
    return home_segments(counts_RE.sum(axis=0).tolist(), home)


def follow_changes(transport: Group, changes: int, seed: int, *, is_replicated: bool) -> Found:
    """The whole script on one rank, and what it saw; weights are loaded anew now and then, between two steps."""
    rank = Rank(transport, seed, is_replicated=is_replicated)
    told = script(seed, changes, transport.size)
    arrivals: Mapping[int, list[Told]] = _arrivals(told, transport.rank, seed)
    last = told[-1].step + MOST_DELAY + 60  # time to fill what was asked for last
    for number in range(1, last):
        for revision in arrivals.get(number, ()):
            rank.offer(revision)
        if random.Random(seed * 1000 + number).random() < 0.01:
            rank.load_weights()
        if number % 2:
            rank.captured_step(number)
        rank.step(number)
    return rank.found


def _arrivals(told: list[Told], rank: int, seed: int) -> dict[int, list[Told]]:
    rng = random.Random(f"{seed}/{rank}")
    arrivals: dict[int, list[Told]] = {}
    for revision in told:
        arrivals.setdefault(revision.step + rng.randint(0, MOST_DELAY), []).append(revision)
    return arrivals


def assert_followed(results: list[Found]) -> None:
    """Outputs are those of one process; all ranks were at one revision, and had one placement, at every step."""
    first = results[0]
    assert max(found.worst for found in results) < 1e-5
    assert all(found.live == first.live for found in results)
    assert all(found.decisions == first.decisions for found in results)
    assert {"lend", "replica"} <= first.decisions.keys()
    assert first.refusals
    assert all(min(found.captured) > 0 for found in results), "captured steps used no replica"
    filling = [live for live in first.live if live[1] == 0 and live[2] > 0]
    assert filling and any(live[1] for live in first.live), "nothing was filled, or nothing switched on"
    assert len({live[1] for live in first.live}) > 3, "the placement hardly changed"
