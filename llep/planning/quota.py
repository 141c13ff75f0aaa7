"""llep's own planner: the lowest maximum load to a tolerance with the fewest lends, within slots and bytes, if it pays.

This is the definition, in plain Python; `native.py` holds the same in compiled form and must equal it bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from llep.cost import layer_s
from llep.loads import home_loads, imbalance_ratio
from llep.placement import Placement
from llep.plan import Decision, Plan, Segment, node_of, relay
from llep.planning.home import plan_home
from llep.planning.options import PlanOptions, lend_slots, max_lends, refusal

# Per mille of the mean load by which the target is above it. Where little is to be won, the last percents would cost as
# many lends as the rest: 50 up to an imbalance ratio of 1.3, falling to 10 at 1.5.
TIGHT, LOOSE = 10, 50
LOOSE_RATIO, TIGHT_RATIO = 1.3, 1.5
# The search for a reachable load ends when its bounds are within 1/128 of the target.
SEARCH_STEP = 128
# Rounds of levelling over resident replicas: load moves one replica further in each.
LEVEL_ROUNDS = 4
# With costs, higher loads are tried too, these 16ths of the way back to the load before, while they can be faster.
RUNGS = (1, 3, 8)

Shares = list[dict[int, int]]  # by expert: tokens by rank


@dataclass(frozen=True, slots=True)
class Attempt:
    """A way to share the tokens: loads that result, shares, and the lends [(expert, dst_rank)] it takes."""

    loads: list[int]
    shares: Shares
    lends: list[tuple[int, int]]
    network_lends: int


@dataclass(frozen=True, slots=True)
class Task:
    """What every attempt starts from, plain EP's loads and shares, and the limits on lends."""

    loads: list[int]
    shares: Shares
    slots: list[int]
    lends: int
    placement: Placement
    options: PlanOptions


def plan_quota(counts_RE: npt.NDArray[np.int64], placement: Placement, options: PlanOptions) -> Plan:
    """A plan, or plain EP with the reason.

    The target is 1% over the mean load (5% where the imbalance is small, unless chunks may be of 1 token), or alpha
    times the mean. Tokens above it first go where resident replicas have room, which takes no transfer. Then the most
    loaded rank lends its largest expert, again and again, until no rank is above the target. If slots don't allow that,
    the lowest load they allow is searched for. Among attempts that reach the same load the one with the fewest lends
    wins, then the one with the fewest across nodes; its lends then carry what levels their ranks. With a cost model the
    attempt with the shortest predicted time wins as it is, and only if that is clearly below plain EP's. In a decode
    step without a cost model only replicas are used. Ties break by lowest index.
    """
    tokens_E: list[int] = counts_RE.sum(axis=0).tolist()
    plain = home_loads(tokens_E, placement.home_rank, placement.ep_size)
    if not any(plain) or imbalance_ratio(plain) < options.imbalance_threshold:
        return plan_home(tokens_E, placement, Decision.BALANCED)
    target = target_load(plain, options)
    if max(plain) <= target:
        return plan_home(tokens_E, placement, Decision.BALANCED)
    shares: Shares = [{home: tokens} for home, tokens in zip(placement.home_rank, tokens_E, strict=True)]
    task = Task(plain, shares, lend_slots(placement, options), max_lends(options), placement, options)
    free = level(task, target)
    if options.cost_model is not None:
        best, gain_s = cheapest(task, target, free)
    else:
        best, gain_s = free if options.phase == "decode" else fewest([free, *search(task, target)], target), 0.0
    if max(best.loads) >= max(plain):
        is_asked = options.phase == "prefill" or options.cost_model is not None
        return plan_home(tokens_E, placement, refusal(plain, placement, options) if is_asked else Decision.NO_GAIN)
    if options.cost_model is None:
        top_up(best, placement)
    decision = Decision.LEND if best.lends else Decision.REPLICA
    segments = cut(counts_RE, best.shares, options.ranks_per_node)
    return Plan(decision, placement, segments, ranks_per_node=options.ranks_per_node, predicted_gain_s=gain_s)


def target_load(plain: Sequence[int], options: PlanOptions) -> int:
    """The load no rank should exceed: alpha times the mean, and at least the tolerance above it."""
    total, ep_size = sum(plain), len(plain)
    permille = TIGHT
    if options.min_chunk_tokens > 1:
        share = (TIGHT_RATIO - imbalance_ratio(plain)) / (TIGHT_RATIO - LOOSE_RATIO)
        permille += int((LOOSE - TIGHT) * min(max(share, 0.0), 1.0))
    return max(math.ceil(options.capacity_factor * total / ep_size), total * (1000 + permille) // (1000 * ep_size))


# -- resident replicas ---------------------------------------------------------------------------------------------


def level(task: Task, target: int) -> Attempt:
    """What replicas alone can do: each expert that touches a rank above the target is levelled over its ranks.

    To level one expert after the other lowers the sum of squared loads each time, and so approaches the best split.
    """
    loads = list(task.loads)
    shares: Shares = [dict(share) for share in task.shares]
    for _ in range(LEVEL_ROUNDS):
        is_changed = False
        for expert, ranks in _replicated(task):
            if max(loads[rank] for rank in ranks) > target:
                is_changed |= _level(shares[expert], ranks, loads)
        if not is_changed:
            break
    return Attempt(loads, shares, [], 0)


def drain(task: Task, target: int) -> tuple[list[int], Shares]:
    """Loads and shares after what is above the target has gone where replicas have room below it."""
    loads = list(task.loads)
    shares: Shares = [dict(share) for share in task.shares]
    for expert, ranks in _replicated(task):
        share = shares[expert]
        while True:
            givers = [rank for rank in ranks if loads[rank] > target and share.get(rank)]
            takers = [rank for rank in ranks if loads[rank] < target]
            if not givers or not takers:
                break
            src = max(givers, key=lambda rank: (loads[rank], -rank))
            dst = min(takers, key=lambda rank: (loads[rank], rank))
            count = min(share[src], loads[src] - target, target - loads[dst])
            share[src] -= count
            share[dst] = share.get(dst, 0) + count
            loads[src] -= count
            loads[dst] += count
    return loads, shares


def _replicated(task: Task) -> list[tuple[int, tuple[int, ...]]]:
    """Experts that have replicas, and their ranks."""
    return [(expert, ranks) for expert, ranks in enumerate(task.placement.holders) if len(ranks) > 1]


def _level(share: dict[int, int], ranks: Sequence[int], loads: list[int]) -> bool:
    """Pour one expert's tokens over its ranks so that the lowest fill up first. Whether anything changed."""
    tokens = sum(share.values())
    below = {rank: loads[rank] - share.get(rank, 0) for rank in ranks}
    order = sorted(ranks, key=lambda rank: (below[rank], rank))
    poured, filled = tokens, 0
    for filled, rank in enumerate(order, start=1):
        poured += below[rank]
        if filled == len(order) or poured <= below[order[filled]] * filled:
            break
    height, extra = divmod(poured, filled)
    is_changed = False
    for position, rank in enumerate(order):
        count = height + (position < extra) - below[rank] if position < filled else 0
        is_changed |= count != share.get(rank, 0)
        share[rank] = count
        loads[rank] = below[rank] + count
    return is_changed


# -- lends ---------------------------------------------------------------------------------------------------------


class Way(IntEnum):
    """How the next lend is chosen; tried in this order until one reaches the target."""

    FIT = 0  # give what is too much, to the helper that it fits best: fewest lends
    REFILL = 1  # give all of an expert where the giver can borrow in turn: reaches far with one slot per rank
    SCARCE = 2  # as REFILL, and fill helpers with few slots first: for unequal slots


def search(task: Task, target: int) -> list[Attempt]:
    """Attempts at the target, else at the lowest load that is reached; with nodes, one that stays in them if it can."""
    attempts = _attempts_at(task, target)
    low, high = target, min(max(attempt.loads) for attempt in attempts)
    while high > target and high - low > max(1, target // SEARCH_STEP):
        middle = (low + high) // 2
        found = _attempts_at(task, middle)
        attempts += found
        reached = min(max(attempt.loads) for attempt in found)
        high = min(high, reached)
        if reached > middle:
            low = middle
    if has_far_helpers(task) and task.options.cost_model is None:
        attempts.append(relieve(task, max(high, target), Way.FIT, in_node_first=True))
    return attempts


def has_far_helpers(task: Task) -> bool:
    """Whether weights may be lent across nodes."""
    ep_size = task.placement.ep_size
    return task.options.lend_scope == "any" and (task.options.ranks_per_node or ep_size) < ep_size


def _attempts_at(task: Task, target: int) -> list[Attempt]:
    attempts: list[Attempt] = []
    for way in Way:
        attempts.append(relieve(task, target, way))
        if max(attempts[-1].loads) <= target:
            break
    return attempts


def relieve(task: Task, target: int, way: Way, *, in_node_first: bool = False) -> Attempt:
    """After replicas the most loaded rank lends until no rank is above the target, or it finds no helper."""
    options = task.options
    loads, shares = drain(task, target)
    slots = list(task.slots)
    lends: list[tuple[int, int]] = []
    network_lends = 0
    of_rank: list[list[int]] = [[] for _ in loads]
    for expert, share in enumerate(shares):
        for rank in share:
            of_rank[rank].append(expert)
    while len(lends) < task.lends:
        over = [rank for rank, load in enumerate(loads) if load > target]
        if not over:
            break
        refillable = [rank for rank in over if slots[rank]] if way is Way.REFILL else []
        src = max(refillable or over, key=lambda rank: (loads[rank], -rank))
        found = _next_lend(task, target, way, loads, slots, shares, of_rank[src], src, in_node_first)
        if found is None:
            break
        expert, dst, count = found
        shares[expert][src] -= count
        shares[expert][dst] = count
        loads[src] -= count
        loads[dst] += count
        slots[dst] -= 1
        lends.append((expert, dst))
        network_lends += node_of(src, options.ranks_per_node) != node_of(dst, options.ranks_per_node)
    return Attempt(loads, shares, lends, network_lends)


def _next_lend(
    task: Task,
    target: int,
    way: Way,
    loads: Sequence[int],
    slots: Sequence[int],
    shares: Shares,
    experts: Sequence[int],
    src: int,
    in_node_first: bool,
) -> tuple[int, int, int] | None:
    """(expert, dst_rank, tokens) of the next lend from `src`, its largest expert first; None if nobody can help."""
    chunk, options = task.options.min_chunk_tokens, task.options
    node = node_of(src, options.ranks_per_node)
    helpers = [rank for rank in range(len(loads)) if slots[rank] and target - loads[rank] >= chunk]
    near = [rank for rank in helpers if node_of(rank, options.ranks_per_node) == node]
    if options.lend_scope == "node" or (in_node_first and near):
        helpers = near
    helpers.sort(key=lambda rank: (loads[rank], rank))
    for expert in sorted(experts, key=lambda expert: (-shares[expert][src], expert)):
        available = shares[expert][src]
        if available < chunk:
            return None
        without = [
            rank for rank in helpers if rank not in shares[expert] and rank not in task.placement.holders[expert]
        ]
        if without:
            is_all = way is not Way.FIT and slots[src] > 0
            amount = available if is_all else min(max(loads[src] - target, chunk), available)
            dst = _helper(way, without, target, loads, slots, amount)
            return expert, dst, min(amount, target - loads[dst])
    return None


def top_up(attempt: Attempt, placement: Placement) -> None:
    """Have lends carry more from experts' homes, while these are fuller than the borrowers: no weights move for it."""
    loads = attempt.loads
    for _ in range(LEVEL_ROUNDS):
        is_changed = False
        for expert, dst in attempt.lends:
            share, home = attempt.shares[expert], placement.home_rank[expert]
            count = min(share[home], (loads[home] - loads[dst]) // 2)
            if count > 0:
                share[home] -= count
                share[dst] += count
                loads[home] -= count
                loads[dst] += count
                is_changed = True
        if not is_changed:
            break


def _helper(
    way: Way, helpers: Sequence[int], target: int, loads: Sequence[int], slots: Sequence[int], amount: int
) -> int:
    """Who takes the next lend; helpers by increasing load."""
    if way is Way.FIT:
        return helpers[pick([target - loads[rank] for rank in helpers], amount)]
    if way is Way.REFILL:
        return helpers[0]
    filled = [rank for rank in helpers if target - loads[rank] <= amount]
    if filled:
        return min(filled, key=lambda rank: (slots[rank], loads[rank], rank))
    return min(helpers, key=lambda rank: (-slots[rank], -loads[rank], rank))


def pick(rooms: Sequence[int], amount: int) -> int:
    """Index of the helper to fill: the tightest that fits, else one of the tightest two, else the first. Rooms fall."""
    fitting = sum(room >= amount for room in rooms)
    if fitting:
        return rooms.index(rooms[fitting - 1])
    large, small = 0, len(rooms) - 1
    best, least = 0, -1
    while large < small:
        spare = rooms[large] + rooms[small] - amount
        if spare < 0:
            small -= 1
            continue
        if least < 0 or spare < least:
            best, least = large, spare
        large += 1
    return best


# -- the choice ----------------------------------------------------------------------------------------------------


def fewest(attempts: Sequence[Attempt], target: int) -> Attempt:
    """The attempt with the fewest lends among those that reach the target; if none does, nearly the lowest load."""
    lowest = min(max(attempt.loads) for attempt in attempts)
    reached = target if lowest <= target else lowest + lowest // SEARCH_STEP
    good = [attempt for attempt in attempts if max(attempt.loads) <= reached]
    return min(good, key=lambda attempt: (len(attempt.lends), attempt.network_lends, max(attempt.loads)))


def cheapest(task: Task, target: int, free: Attempt) -> tuple[Attempt, float]:
    """The attempt with the shortest predicted time and the seconds it saves; plain EP and 0 unless that is enough."""
    model = task.options.cost_model
    assert model is not None
    plain = best = Attempt(task.loads, task.shares, [], 0)
    plain_s = best_s = predicted_s(plain, task)

    def consider(attempt: Attempt) -> None:
        nonlocal best, best_s
        seconds = predicted_s(attempt, task) + model.plan_s
        if seconds < best_s and max(attempt.loads) < max(task.loads):
            best, best_s = attempt, seconds

    consider(free)
    attempts = [free, *search(task, target)]
    lowest = fewest(attempts, target)
    consider(lowest)
    is_far = has_far_helpers(task)
    reached, worst = max(lowest.loads), max(free.loads)
    token_s = model.least_token_s * model.scale(task.options.bytes_per_expert)
    for rung in RUNGS:
        level = reached + (worst - reached) * rung // 16
        if level * token_s >= best_s:
            break
        consider(relieve(task, level, Way.FIT, in_node_first=is_far))
    if plain_s - best_s < model.margin_ratio * plain_s:
        return plain, 0.0
    return best, plain_s - best_s


def predicted_s(attempt: Attempt, task: Task) -> float:
    """Seconds of the layer under this attempt, without planning."""
    assert task.options.cost_model is not None
    receivers: dict[int, list[int]] = {}
    for expert, rank in sorted(attempt.lends):
        receivers.setdefault(expert, []).append(rank)
    placement, per_node = task.placement, task.options.ranks_per_node
    hops = relay(receivers, placement, per_node)
    model, per_expert = task.options.cost_model, task.options.bytes_per_expert
    return layer_s(attempt.shares, placement.holders, hops, placement.ep_size, per_node, model, per_expert)


# -- segments ------------------------------------------------------------------------------------------------------


def cut(counts_RE: npt.NDArray[np.int64], shares: Shares, ranks_per_node: int | None) -> list[Segment]:
    """Segments that give each rank its share: its own tokens first, then those of its node, then the others'."""
    segments: list[Segment] = []
    for expert, share in enumerate(shares):
        ranks = sorted(rank for rank, tokens in share.items() if tokens)
        if len(ranks) == 1:
            segments.append(Segment(expert, ranks[0], 0, share[ranks[0]]))
        elif ranks:
            segments += _merged(_cut(expert, counts_RE[:, expert].tolist(), share, ranks, ranks_per_node))
    return segments


def _cut(
    expert: int, counts: Sequence[int], share: dict[int, int], ranks: Sequence[int], ranks_per_node: int | None
) -> Iterable[Segment]:
    own = {rank: min(share[rank], counts[rank]) for rank in ranks}
    left = {rank: share[rank] - own[rank] for rank in ranks}
    free = [count - own.get(source, 0) for source, count in enumerate(counts)]
    near = _node_shares(free, left, ranks, ranks_per_node)
    far = {rank: left[rank] - near[rank] for rank in ranks}
    position = 0
    for source in range(len(counts)):
        if own.get(source):
            yield Segment(expert, source, position, position + own[source])
            position += own[source]
        node = node_of(source, ranks_per_node)
        unclaimed = free[source]
        for wanted in (near, far):
            for rank in ranks:
                if wanted is far or node_of(rank, ranks_per_node) == node:
                    count = min(unclaimed, wanted[rank])
                    if count:
                        yield Segment(expert, rank, position, position + count)
                    position += count
                    unclaimed -= count
                    wanted[rank] -= count


def _node_shares(
    free: Sequence[int], left: dict[int, int], ranks: Sequence[int], ranks_per_node: int | None
) -> dict[int, int]:
    """How much of what each rank still wants its node's tokens can give, lower ranks first."""
    near: dict[int, int] = {}
    of_node: dict[int, int] = {}
    for source, count in enumerate(free):
        node = node_of(source, ranks_per_node)
        of_node[node] = of_node.get(node, 0) + count
    for rank in ranks:
        node = node_of(rank, ranks_per_node)
        near[rank] = min(left[rank], of_node[node])
        of_node[node] -= near[rank]
    return near


def _merged(segments: Iterable[Segment]) -> list[Segment]:
    merged: list[Segment] = []
    for segment in segments:
        if merged and merged[-1].rank == segment.rank:
            merged[-1] = merged[-1]._replace(stop=segment.stop)
        else:
            merged.append(segment)
    return merged
