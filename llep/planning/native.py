"""The compiled twins of `quota.py` and `least_loaded.py`: the same plans, bit for bit, in microseconds.

The readable ones say what they do and why. Arrays go in, one array of segments comes out; no Python object is made
inside, and working memory is bounded by ranks, experts and slots. `warm_up` compiles, or loads the machine code that
an earlier start left on disk.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

from llep.cost import CostModel
from llep.placement import Placement
from llep.plan import RELAY_FAN_OUT, Decision, Plan
from llep.planning.options import MAX_COUNT, NO_LIMIT, PlanOptions, max_lends, refuse_counts
from llep.planning.quota import LEVEL_ROUNDS, LOOSE, LOOSE_RATIO, RUNGS, SEARCH_STEP, TIGHT, TIGHT_RATIO, Way

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
F = TypeVar("F", bound=Callable[..., Any])

FIT, REFILL, SCARCE = int(Way.FIT), int(Way.REFILL), int(Way.SCARCE)
DECISIONS = tuple(Decision)
LEND, REPLICA, BALANCED = (DECISIONS.index(d) for d in (Decision.LEND, Decision.REPLICA, Decision.BALANCED))
NO_GAIN, NO_SLOT, MEMORY = (DECISIONS.index(d) for d in (Decision.NO_GAIN, Decision.NO_SLOT, Decision.MEMORY))
REFUSED = -1  # in place of a decision: a count is out of range
MAX_ATTEMPTS = 192  # the search halves an interval of at most 2^62, with up to 3 attempts each time
RUNGS_16 = np.array(RUNGS, dtype=np.int64)
NO_INTS = np.zeros(0, dtype=np.int64)
NO_FLOATS = np.zeros(0, dtype=np.float64)


class Tables(NamedTuple):
    """See llep.placement.PlacementArrays; node_R: node of each rank."""

    instance_expert_I: Ints
    instance_rank_I: Ints
    rank_starts: Ints
    rank_instances: Ints
    replica_starts: Ints
    node_R: Ints


class Limits(NamedTuple):
    chunk: int
    most_lends: int
    ranks_per_node: int
    is_node_scope: bool


class Costs(NamedTuple):
    """figures: launch, node latency and rate, network latency and rate, overlap, planning, least_token_s, margin.

    start_s_I: seconds of each instance's work as attempts start.
    """

    curve_tokens: Ints
    curve_s: Floats
    slopes: Floats
    figures: Floats
    start_s_I: Floats
    scale: float
    size_bytes: int


class Start(NamedTuple):
    """What every attempt starts from: plain EP; by_load: ranks by increasing load. And what replicas alone can do."""

    loads: Ints
    slots: Ints
    tokens_I: Ints
    by_load: Ints
    levelled_loads: Ints
    levelled_tokens_I: Ints


class State(NamedTuple):
    """What the last attempt did, and room to work in.

    lends_4N rows: expert, dst_rank, tokens, the lend of the same expert before it (-1: none; first_lend_E[e] is the
    newest). hops_3N rows: round, src_rank, dst_rank.
    """

    loads: Ints
    slots: Ints
    tokens_I: Ints
    first_lend_E: Ints
    lends_4N: Ints
    hops_3N: Ints
    times_3R: Floats
    work_4R: Ints
    busy_4R: Ints
    no_keys_R: Ints  # zeros: to sort by rank alone


class Tried(NamedTuple):
    """Attempts by number, 0 being the one without lends.

    columns: target, way, in node first, maximum load, lends, lends across nodes. held: the attempt that each of the two
    states holds, -1 for none. size: [number of attempts].
    """

    columns: Ints
    held: Ints
    size: Ints


def _cache_folder() -> Path:
    """Where the machine code is kept: beside the source, else in the user's cache, else in the temporary folder.

    The name is a digest of all that is compiled in. Numba looks at this file alone, but constants come from others.
    """
    here = Path(__file__).parent
    sources = (here / "native.py", here / "quota.py", here / "options.py", here.parent / "plan.py")
    name = "llep-" + hashlib.blake2b(b"".join(path.read_bytes() for path in sources), digest_size=6).hexdigest()
    roots = [Path(numba.config.CACHE_DIR)] if numba.config.CACHE_DIR else [here / "__pycache__", Path.home() / ".cache"]
    for root in roots:
        try:
            (root / name).mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(root / name, os.W_OK):
            return root / name
    return Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"


# For the functions of this module only: other users of numba in this process keep their folder.
_others_cache, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(_cache_folder())


def compiled(function: F) -> F:
    return cast(F, numba.njit(cache=True)(function))


def inlined(function: F) -> F:
    """Compiled into its caller: a call that passes arrays costs 5 ns for each of them, to count references."""
    return cast(F, numba.njit(cache=True, inline="always")(function))


# -- small parts ---------------------------------------------------------------------------------------------------


@compiled
def _sum_counts(counts_RE: Ints, tokens_E: Ints) -> bool:
    """Fill tokens_E with the sums over ranks; whether all counts are in 0..MAX_COUNT, a power of 2 minus 1."""
    bits = 0
    tokens_E[:] = 0
    for rank in range(counts_RE.shape[0]):
        for expert in range(counts_RE.shape[1]):
            count = counts_RE[rank, expert]
            tokens_E[expert] += count
            bits |= count
    return 0 <= bits <= MAX_COUNT


@compiled
def _sort_by(keys: Ints, items: Ints, size: int) -> None:
    """Sort items[:size] in place by increasing keys[item], then item (shell sort)."""
    for gap in (57, 23, 10, 4, 1):
        for index in range(gap, size):
            item = items[index]
            key = keys[item]
            place = index
            while place >= gap:
                before = items[place - gap]
                if keys[before] < key or (keys[before] == key and before < item):
                    break
                items[place] = before
                place -= gap
            items[place] = item


@inlined
def _insert(keys: Ints, items: Ints, size: int, item: int) -> int:
    """Insert into items[:size], sorted by keys[item], then item. The new size."""
    place = size
    key = keys[item]
    while place > 0:
        before = items[place - 1]
        if keys[before] < key or (keys[before] == key and before < item):
            break
        items[place] = before
        place -= 1
    items[place] = item
    return size + 1


@inlined
def _remove(items: Ints, size: int, item: int) -> int:
    """Remove from items[:size], keeping the order. The new size."""
    place = 0
    while items[place] != item:
        place += 1
    for index in range(place, size - 1):
        items[index] = items[index + 1]
    return size - 1


@inlined
def _remove_last(items: Ints, size: int, item: int) -> int:
    """As _remove, for an item that is at or near the end."""
    place = size - 1
    while items[place] != item:
        place -= 1
    for index in range(place, size - 1):
        items[index] = items[index + 1]
    return size - 1


@compiled
def _target(total: int, worst: int, ep_size: int, capacity_factor: float, chunk: int) -> int:
    permille = TIGHT
    if chunk > 1:
        share = (TIGHT_RATIO - worst * ep_size / total) / (TIGHT_RATIO - LOOSE_RATIO)
        permille += int((LOOSE - TIGHT) * min(max(share, 0.0), 1.0))
    return max(int(np.ceil(capacity_factor * total / ep_size)), total * (1000 + permille) // (1000 * ep_size))


@inlined
def _replicas(expert: int, tables: Tables) -> tuple[int, int]:
    """The expert's replicas are the instances first to last - 1."""
    num_experts = len(tables.replica_starts) - 1
    return num_experts + tables.replica_starts[expert], num_experts + tables.replica_starts[expert + 1]


@compiled
def _level(expert: int, tokens_I: Ints, loads: Ints, tables: Tables, order: Ints, below: Ints) -> bool:
    first, last = _replicas(expert, tables)
    size = 0
    poured = 0
    for index in range(first - 1, last):
        instance = expert if index < first else index
        rank = tables.instance_rank_I[instance]
        below[rank] = loads[rank] - tokens_I[instance]
        poured += tokens_I[instance]
        size = _insert(below, order, size, rank)
    filled = 0
    while True:
        poured += below[order[filled]]
        filled += 1
        if filled == size or poured <= below[order[filled]] * filled:
            break
    height, extra = poured // filled, poured % filled
    is_changed = False
    for index in range(first - 1, last):
        instance = expert if index < first else index
        rank = tables.instance_rank_I[instance]
        place = 0
        while order[place] != rank:
            place += 1
        count = height + (1 if place < extra else 0) - below[rank] if place < filled else 0
        is_changed |= count != tokens_I[instance]
        tokens_I[instance] = count
        loads[rank] = below[rank] + count
    return is_changed


@compiled
def _level_all(tokens_I: Ints, loads: Ints, tables: Tables, target: int, order: Ints, below: Ints) -> None:
    """quota.level, in place."""
    for _ in range(LEVEL_ROUNDS):
        is_changed = False
        for expert in range(len(tables.replica_starts) - 1):
            first, last = _replicas(expert, tables)
            if first == last:
                continue
            worst = loads[tables.instance_rank_I[expert]]
            for instance in range(first, last):
                worst = max(worst, loads[tables.instance_rank_I[instance]])
            if worst > target:
                is_changed |= _level(expert, tokens_I, loads, tables, order, below)
        if not is_changed:
            break


@compiled
def _drain(tokens_I: Ints, loads: Ints, tables: Tables, target: int) -> bool:
    """quota.drain, in place. Whether anything moved."""
    is_changed = False
    for expert in range(len(tables.replica_starts) - 1):
        first, last = _replicas(expert, tables)
        while first < last:
            giver = taker = src = dst = -1
            for index in range(first - 1, last):
                instance = expert if index < first else index
                rank = tables.instance_rank_I[instance]
                load = loads[rank]
                if load > target and tokens_I[instance]:
                    if giver < 0 or load > loads[src] or (load == loads[src] and rank < src):
                        giver, src = instance, rank
                if load < target:
                    if taker < 0 or load < loads[dst] or (load == loads[dst] and rank < dst):
                        taker, dst = instance, rank
            if giver < 0 or taker < 0:
                break
            count = min(tokens_I[giver], loads[src] - target, target - loads[dst])
            tokens_I[giver] -= count
            tokens_I[taker] += count
            loads[src] -= count
            loads[dst] += count
            is_changed = True
    return is_changed


# -- lends ---------------------------------------------------------------------------------------------------------


@inlined
def _pick(helpers: Ints, size: int, loads: Ints, target: int, amount: int) -> int:
    limit = target - amount  # a helper fits if its load is at most this
    low, high = 0, size
    while low < high:
        middle = (low + high) // 2
        if loads[helpers[middle]] <= limit:
            low = middle + 1
        else:
            high = middle
    if low:
        index = low - 1
        while index and loads[helpers[index - 1]] == loads[helpers[low - 1]]:
            index -= 1
        return index
    large, small = 0, size - 1
    best, least = 0, -1
    while large < small:
        spare = 2 * target - loads[helpers[large]] - loads[helpers[small]] - amount
        if spare < 0:
            small -= 1
            continue
        if least < 0 or spare < least:
            best, least = large, spare
        large += 1
    return best


@inlined
def _scarcest(helpers: Ints, size: int, loads: Ints, slots: Ints, target: int, amount: int) -> int:
    best = -1
    for index in range(size):
        rank = helpers[index]
        if target - loads[rank] <= amount:
            if best < 0 or slots[rank] < slots[best] or (slots[rank] == slots[best] and loads[rank] < loads[best]):
                best = rank
    if best >= 0:
        return best
    for index in range(size):
        rank = helpers[index]
        if best < 0 or slots[rank] > slots[best] or (slots[rank] == slots[best] and loads[rank] > loads[best]):
            best = rank
    return best


@inlined
def _insert_over(loads: Ints, over: Ints, size: int, item: int) -> int:
    """Insert into over[:size], sorted so that the rank to relieve next, the most loaded and lowest, is last."""
    place = size
    load = loads[item]
    while place > 0:
        before = over[place - 1]
        if loads[before] < load or (loads[before] == load and before > item):
            break
        over[place] = before
        place -= 1
    over[place] = item
    return size + 1


@inlined
def _next_src(way: int, over: Ints, num_over: int, slots: Ints) -> int:
    """The rank to relieve next: the most loaded; with REFILL, the most loaded that has a slot if there is one."""
    if way == REFILL:
        for index in range(num_over - 1, -1, -1):
            if slots[over[index]] > 0:
                return int(over[index])
    return int(over[num_over - 1])


@inlined
def _next_instance(src: int, last: int, tokens_I: Ints, tables: Tables) -> int:
    """The largest expert of src, lowest index first, that comes after instance `last` (-1: the first); -1 if none."""
    best = -1
    for index in range(tables.rank_starts[src], tables.rank_starts[src + 1]):
        instance = tables.rank_instances[index]
        if last >= 0 and not _is_larger(last, instance, tokens_I, tables):
            continue
        if best < 0 or _is_larger(instance, best, tokens_I, tables):
            best = instance
    return best


@inlined
def _is_larger(one: int, other: int, tokens_I: Ints, tables: Tables) -> bool:
    if tokens_I[one] != tokens_I[other]:
        return bool(tokens_I[one] > tokens_I[other])
    return bool(tables.instance_expert_I[one] < tables.instance_expert_I[other])


@inlined
def _mark(rank: int, mark: int, marks_R: Ints, target: int, chunk: int, loads: Ints, slots: Ints) -> bool:
    """Mark a rank that has an expert's weights; whether it would be a helper otherwise."""
    marks_R[rank] = mark
    return bool(slots[rank] > 0 and target - loads[rank] >= chunk)


@compiled
def _relieve(
    target: int, way: int, in_node_first: bool, start: Start, limits: Limits, tables: Tables, state: State
) -> tuple[int, int, int]:
    """One attempt: (maximum load, lends, lends across nodes); what it did is in `state`."""
    loads, slots, tokens_I, chunk = state.loads, state.slots, state.tokens_I, limits.chunk
    loads[:] = start.loads
    slots[:] = start.slots
    tokens_I[:] = start.tokens_I
    state.first_lend_E[:] = -1
    helpers, over, candidates, marks_R = state.work_4R[0], state.work_4R[1], state.work_4R[2], state.work_4R[3]
    marks_R[:] = -1
    num_helpers = num_over = num_lends = network_lends = mark = 0
    by_load = start.by_load
    if len(tokens_I) > len(state.first_lend_E) and _drain(tokens_I, loads, tables, target):
        by_load = by_load.copy()
        _sort_by(loads, by_load, len(by_load))
    for rank in by_load:
        if loads[rank] > target:
            num_over = _insert_over(loads, over, num_over, rank)
        elif slots[rank] and target - loads[rank] >= chunk:
            helpers[num_helpers] = rank
            num_helpers += 1
    while num_over and num_lends < limits.most_lends:
        src = _next_src(way, over, num_over, slots)
        node = tables.node_R[src]
        low = node * limits.ranks_per_node
        high = min(low + limits.ranks_per_node, len(loads))
        is_near_only = limits.is_node_scope
        if in_node_first:
            for rank in range(low, high):
                is_near_only |= slots[rank] > 0 and target - loads[rank] >= chunk
        instance = size = 0
        last = -1
        while size == 0:
            instance = _next_instance(src, last, tokens_I, tables)
            if instance < 0 or tokens_I[instance] < chunk:
                break
            expert = tables.instance_expert_I[instance]
            is_filtered = _mark(tables.instance_rank_I[expert], mark, marks_R, target, chunk, loads, slots)
            first_replica, last_replica = _replicas(expert, tables)
            for replica in range(first_replica, last_replica):
                is_filtered |= _mark(tables.instance_rank_I[replica], mark, marks_R, target, chunk, loads, slots)
            lend = state.first_lend_E[expert]
            while lend >= 0:
                is_filtered |= _mark(state.lends_4N[1, lend], mark, marks_R, target, chunk, loads, slots)
                lend = state.lends_4N[3, lend]
            if is_near_only:
                for rank in range(low, high):
                    if marks_R[rank] != mark and slots[rank] > 0 and target - loads[rank] >= chunk:
                        size = _insert(loads, candidates, size, rank)
            elif is_filtered:
                for index in range(num_helpers):
                    candidates[size] = helpers[index]
                    size += 1 if marks_R[helpers[index]] != mark else 0
            else:
                size = num_helpers
                for index in range(num_helpers):
                    candidates[index] = helpers[index]
            mark += 1
            last = instance
        if size == 0:
            break
        expert, amount = tables.instance_expert_I[instance], tokens_I[instance]
        if way == FIT or slots[src] == 0:
            amount = min(max(loads[src] - target, chunk), amount)
        if way == FIT:
            dst = candidates[_pick(candidates, size, loads, target, amount)]
        elif way == REFILL:
            dst = candidates[0]
        else:
            dst = _scarcest(candidates, size, loads, slots, target, amount)
        count = min(amount, target - loads[dst])
        state.lends_4N[0, num_lends] = expert
        state.lends_4N[1, num_lends] = dst
        state.lends_4N[2, num_lends] = count
        state.lends_4N[3, num_lends] = state.first_lend_E[expert]
        state.first_lend_E[expert] = num_lends
        num_lends += 1
        network_lends += 1 if tables.node_R[dst] != node else 0
        tokens_I[instance] -= count
        num_helpers = _remove(helpers, num_helpers, dst)
        loads[dst] += count
        slots[dst] -= 1
        if slots[dst] and target - loads[dst] >= chunk:
            num_helpers = _insert(loads, helpers, num_helpers, dst)
        num_over = _remove_last(over, num_over, src)
        loads[src] -= count
        if loads[src] > target:
            num_over = _insert_over(loads, over, num_over, src)
        elif slots[src] and target - loads[src] >= chunk:
            num_helpers = _insert(loads, helpers, num_helpers, src)
    return loads.max(), num_lends, network_lends


@compiled
def _top_up(num_lends: int, instance_rank_I: Ints, state: State) -> None:
    """Have lends carry more from experts' homes, while these are fuller than the borrowers."""
    loads, tokens_I, lends_4N = state.loads, state.tokens_I, state.lends_4N
    for _ in range(LEVEL_ROUNDS):
        is_changed = False
        for lend in range(num_lends):
            expert, dst = lends_4N[0, lend], lends_4N[1, lend]
            home = instance_rank_I[expert]
            count = min(tokens_I[expert], (loads[home] - loads[dst]) // 2)
            if count > 0:
                tokens_I[expert] -= count
                lends_4N[2, lend] += count
                loads[home] -= count
                loads[dst] += count
                is_changed = True
        if not is_changed:
            break


# -- costs ---------------------------------------------------------------------------------------------------------


@inlined
def _expert_s(tokens: int, costs: Costs) -> float:
    index = 0
    while index + 1 < len(costs.curve_tokens) and costs.curve_tokens[index + 1] <= tokens:
        index += 1
    beyond = max(tokens - costs.curve_tokens[index], 0)
    return float((costs.curve_s[index] + costs.slopes[index] * beyond) * costs.scale)


@inlined
def _fan_out(
    senders: Ints, num_senders: int, receivers: Ints, low: int, high: int, round_: int, hops_3N: Ints, num_hops: int
) -> int:
    """Append the hops to receivers[low:high]; the new number of hops. senders must have room for the receivers."""
    is_relayed = high - low >= RELAY_FAN_OUT
    position = low
    while position < high:
        batch = min(num_senders, high - position) if is_relayed else high - position
        for index in range(batch):
            hops_3N[0, num_hops] = round_
            hops_3N[1, num_hops] = senders[index % num_senders]
            hops_3N[2, num_hops] = receivers[position + index]
            num_hops += 1
        for index in range(batch):
            senders[num_senders + index] = receivers[position + index]
        num_senders += batch
        position += batch
        round_ += 1
    return num_hops


@inlined
def _relay(
    expert: int,
    receivers: Ints,
    size: int,
    tables: Tables,
    hops_3N: Ints,
    num_hops: int,
    entries: Ints,
    senders: Ints,
    holders: Ints,
) -> int:
    """Append the relay tree of one expert to the hops; the new number of hops. receivers[:size] increase."""
    holders[0] = tables.instance_rank_I[expert]
    num_holders = 1
    first, last = _replicas(expert, tables)
    for instance in range(first, last):
        holders[num_holders] = tables.instance_rank_I[instance]
        num_holders += 1
    num_entries = 0
    last_node = -1
    for index in range(size):
        node = tables.node_R[receivers[index]]
        if node != last_node:
            last_node = node
            is_held = False
            for place in range(num_holders):
                is_held |= tables.node_R[holders[place]] == node
            if not is_held:
                entries[num_entries] = receivers[index]
                num_entries += 1
    entry_hop = num_hops
    for place in range(num_holders):
        senders[place] = holders[place]
    num_hops = _fan_out(senders, num_holders, entries, 0, num_entries, 0, hops_3N, num_hops)
    index = entry = 0
    while index < size:
        low = index
        node = tables.node_R[receivers[index]]
        while index < size and tables.node_R[receivers[index]] == node:
            index += 1
        first_round = num_senders = 0
        if entry < num_entries and entries[entry] == receivers[low]:
            senders[0] = entries[entry]
            num_senders = 1
            first_round = hops_3N[0, entry_hop + entry] + 1
            entry += 1
            low += 1
        else:
            for place in range(num_holders):
                if tables.node_R[holders[place]] == node:
                    senders[num_senders] = holders[place]
                    num_senders += 1
        num_hops = _fan_out(senders, num_senders, receivers, low, index, first_round, hops_3N, num_hops)
    return num_hops


@inlined
def _fill_arrivals(num_hops: int, node_R: Ints, costs: Costs, state: State) -> None:
    """Fill times_3R[2] with the time at which each rank has its last lend."""
    arrival_s, hops_3N, busy_4R = state.times_3R[2], state.hops_3N, state.busy_4R
    arrival_s[:] = 0.0
    busy_4R[:] = 0
    last_round = -1
    for hop in range(num_hops):
        last_round = max(last_round, hops_3N[0, hop])
    now_s = 0.0
    for round_ in range(last_round + 1):
        most_near = most_far = 0
        for hop in range(num_hops):
            if hops_3N[0, hop] == round_:
                src, dst = hops_3N[1, hop], hops_3N[2, hop]
                port = 0 if node_R[src] == node_R[dst] else 2
                busy_4R[port, src] += 1
                busy_4R[port + 1, dst] += 1
                most = max(busy_4R[port, src], busy_4R[port + 1, dst])
                if port:
                    most_far = max(most_far, most)
                else:
                    most_near = max(most_near, most)
        round_s = 0.0
        if most_near:
            round_s = costs.figures[1] + most_near * costs.size_bytes / costs.figures[2]
        if most_far:
            round_s = max(round_s, costs.figures[3] + most_far * costs.size_bytes / costs.figures[4])
        now_s += round_s
        for hop in range(num_hops):
            if hops_3N[0, hop] == round_:
                src, dst = hops_3N[1, hop], hops_3N[2, hop]
                busy_4R[0, src] = busy_4R[2, src] = busy_4R[1, dst] = busy_4R[3, dst] = 0
                arrival_s[dst] = now_s


@compiled
def _predicted_s(start: Start, costs: Costs, tables: Tables, state: State) -> float:
    """Seconds of the layer under the last attempt."""
    own_s, lent_s, arrival_s = state.times_3R[0], state.times_3R[1], state.times_3R[2]
    own_s[:] = 0.0
    lent_s[:] = 0.0
    receivers, entries, senders, holders = state.work_4R[0], state.work_4R[1], state.work_4R[2], state.work_4R[3]
    num_hops = 0
    for expert in range(len(state.first_lend_E)):
        first, last = _replicas(expert, tables)
        for index in range(first - 1, last):
            instance = expert if index < first else index
            if state.tokens_I[instance]:
                rank = tables.instance_rank_I[instance]
                if own_s[rank] == 0.0:
                    own_s[rank] = costs.figures[0]
                if state.tokens_I[instance] == start.tokens_I[instance]:
                    own_s[rank] += costs.start_s_I[instance]
                else:
                    own_s[rank] += _expert_s(state.tokens_I[instance], costs)
        lend = state.first_lend_E[expert]
        size = 0
        while lend >= 0:
            rank = state.lends_4N[1, lend]
            size = _insert(state.no_keys_R, receivers, size, rank)
            if lent_s[rank] == 0.0:
                lent_s[rank] = costs.figures[0]
            lent_s[rank] += _expert_s(state.lends_4N[2, lend], costs)
            lend = state.lends_4N[3, lend]
        if size:
            num_hops = _relay(expert, receivers, size, tables, state.hops_3N, num_hops, entries, senders, holders)
    _fill_arrivals(num_hops, tables.node_R, costs, state)
    step_s = 0.0
    for rank in range(len(own_s)):
        wait_s = max(arrival_s[rank] - costs.figures[5] * own_s[rank], 0.0)
        step_s = max(step_s, own_s[rank] + lent_s[rank] + wait_s)
    return step_s


# -- segments ------------------------------------------------------------------------------------------------------


@inlined
def _positions(counts_RE: Ints, experts: Ints, num_split: int) -> Ints:
    """Where each rank's tokens start in the global order of some experts' tokens: [experts, R + 1].

    Eight ranks at a time: the column of one expert by itself would miss the cache with each rank.
    """
    ep_size = len(counts_RE)
    positions = np.empty((num_split, ep_size + 1), dtype=np.int64)
    for low in range(0, ep_size, 8):
        high = min(low + 8, ep_size)
        for index in range(num_split):
            expert = experts[index]
            position = positions[index, low] if low else np.int64(0)
            positions[index, low] = position
            for source in range(low, high):
                position += counts_RE[source, expert]
                positions[index, source + 1] = position
    return positions


@inlined
def _split_experts(tables: Tables, state: State, experts: Ints) -> tuple[int, int]:
    """Fill `experts` with those that several ranks compute; their number, and that of their (expert, rank) pairs."""
    num_split = num_shares = 0
    for expert in range(len(state.first_lend_E)):
        count = 0
        first, last = _replicas(expert, tables)
        for index in range(first - 1, last):
            count += 1 if state.tokens_I[expert if index < first else index] else 0
        lend = state.first_lend_E[expert]
        while lend >= 0:
            count += 1
            lend = state.lends_4N[3, lend]
        if count > 1:
            experts[num_split] = expert
            num_split += 1
            num_shares += count
    return num_split, num_shares


@compiled
def _cut(counts_RE: Ints, ranks_per_node: int, tables: Tables, state: State) -> Ints:
    ep_size, num_experts = counts_RE.shape
    split = np.empty(num_experts, dtype=np.int64)
    num_split, num_shares = _split_experts(tables, state, split)
    positions = _positions(counts_RE, split, num_split)
    # A rank has at most 3 pieces (own, near, far), and each own or near piece cuts another in two.
    segments = np.empty((num_experts + 8 * num_shares, 4), dtype=np.int64)
    size = split_index = 0
    ranks, share, near, far = state.work_4R[0], state.work_4R[1], state.work_4R[2], state.work_4R[3]
    own = state.busy_4R[0]
    for expert in range(num_experts):
        if split_index < num_split and split[split_index] == expert:
            size = _cut_expert(
                expert,
                positions[split_index],
                ranks_per_node,
                tables,
                state,
                segments,
                size,
                ranks,
                share,
                near,
                far,
                own,
            )
            split_index += 1
            continue
        first, last = _replicas(expert, tables)
        rank, tokens = tables.instance_rank_I[expert], state.tokens_I[expert]
        for instance in range(first, last):
            if state.tokens_I[instance]:
                rank, tokens = tables.instance_rank_I[instance], state.tokens_I[instance]
        lend = state.first_lend_E[expert]
        if lend >= 0:
            rank, tokens = state.lends_4N[1, lend], state.lends_4N[2, lend]
        if tokens:
            segments[size, 0] = expert
            segments[size, 1] = rank
            segments[size, 2] = 0
            segments[size, 3] = tokens
            size += 1
    return segments[:size].copy()


@inlined
def _cut_expert(
    expert: int,
    positions: Ints,
    ranks_per_node: int,
    tables: Tables,
    state: State,
    segments: Ints,
    size: int,
    ranks: Ints,
    share: Ints,
    near: Ints,
    far: Ints,
    own: Ints,
) -> int:
    """Append the segments of an expert that several ranks compute; the new number of segments."""
    num_ranks = 0
    first, last = _replicas(expert, tables)
    for index in range(first - 1, last):
        instance = expert if index < first else index
        if state.tokens_I[instance]:
            share[tables.instance_rank_I[instance]] = state.tokens_I[instance]
            num_ranks = _insert(state.no_keys_R, ranks, num_ranks, tables.instance_rank_I[instance])
    lend = state.first_lend_E[expert]
    while lend >= 0:
        share[state.lends_4N[1, lend]] = state.lends_4N[2, lend]
        num_ranks = _insert(state.no_keys_R, ranks, num_ranks, state.lends_4N[1, lend])
        lend = state.lends_4N[3, lend]
    ep_size = len(positions) - 1
    low = 0
    while low < num_ranks:
        node = tables.node_R[ranks[low]]
        free = positions[min((node + 1) * ranks_per_node, ep_size)] - positions[node * ranks_per_node]
        high = low
        while high < num_ranks and tables.node_R[ranks[high]] == node:
            rank = ranks[high]
            own[rank] = min(share[rank], positions[rank + 1] - positions[rank])
            free -= own[rank]
            high += 1
        for index in range(low, high):
            rank = ranks[index]
            near[rank] = min(share[rank] - own[rank], free)
            far[rank] = share[rank] - own[rank] - near[rank]
            free -= near[rank]
        low = high
    # Between the own pieces, a node's tokens go to its ranks until these have what they want, the rest to the others.
    position = start = near_index = far_index = own_index = 0
    current = np.int64(-1)
    while position < positions[ep_size]:
        while own_index < num_ranks and own[ranks[own_index]] == 0:
            own_index += 1
        while near_index < num_ranks and near[ranks[near_index]] == 0:
            near_index += 1
        next_own = positions[ranks[own_index]] if own_index < num_ranks else positions[ep_size]
        next_near = positions[ep_size]
        if near_index < num_ranks:
            next_near = positions[tables.node_R[ranks[near_index]] * ranks_per_node]
        if own_index < num_ranks and next_own == position:
            rank = ranks[own_index]
            count = own[rank]
            own_index += 1
        elif next_near <= position:
            rank = ranks[near_index]
            count = min(near[rank], next_own - position)
            near[rank] -= count
        else:
            while far[ranks[far_index]] == 0:
                far_index += 1
            rank = ranks[far_index]
            count = min(far[rank], min(next_own, next_near) - position)
            far[rank] -= count
        if rank != current:
            if position > start:
                segments[size, 0] = expert
                segments[size, 1] = current
                segments[size, 2] = start
                segments[size, 3] = position
                size += 1
            current, start = rank, position
        position += count
    segments[size, 0] = expert
    segments[size, 1] = current
    segments[size, 2] = start
    segments[size, 3] = position
    return size + 1


# -- the plan ------------------------------------------------------------------------------------------------------


@compiled
def _home(tokens_E: Ints, instance_rank_I: Ints) -> Ints:
    segments = np.zeros((len(tokens_E), 4), dtype=np.int64)
    size = 0
    for expert in range(len(tokens_E)):
        if tokens_E[expert]:
            segments[size, 0] = expert
            segments[size, 1] = instance_rank_I[expert]
            segments[size, 3] = tokens_E[expert]
            size += 1
    return segments[:size]


@compiled
def _refusal(plain: Ints, total: int, slots_R: Ints, lend_slots: Ints, most_lends: int) -> int:
    mean = total / len(plain)
    has_lend_slot = has_slot = False
    for rank in range(len(plain)):
        if plain[rank] < mean:
            has_lend_slot |= lend_slots[rank] > 0
            has_slot |= slots_R[rank] > 0
    if most_lends and has_lend_slot:
        return NO_GAIN
    return MEMORY if has_slot else NO_SLOT


@compiled
def _plan(
    counts_RE: Ints,
    slots_R: Ints,
    instance_expert_I: Ints,
    instance_rank_I: Ints,
    rank_starts: Ints,
    rank_instances: Ints,
    replica_starts: Ints,
    free_bytes_R: Ints,
    curve_tokens: Ints,
    curve_s: Floats,
    slopes: Floats,
    figures: Floats,
    expert_bytes: int,
    imbalance_threshold: float,
    capacity_factor: float,
    chunk: int,
    bytes_per_expert: int,
    most_lends: int,
    ranks_per_node: int,
    is_node_scope: bool,
    is_decode: bool,
) -> tuple[int, Ints, float]:
    """(index of the decision, segments, predicted gain in seconds). Without a curve: no costs."""
    ep_size, num_experts = counts_RE.shape
    tokens_E = np.empty(num_experts, dtype=np.int64)
    if not _sum_counts(counts_RE, tokens_E):
        return REFUSED, np.empty((0, 4), dtype=np.int64), 0.0
    plain = np.zeros(ep_size, dtype=np.int64)
    for expert in range(num_experts):
        plain[instance_rank_I[expert]] += tokens_E[expert]
    total, plain_worst = plain.sum(), plain.max()
    if total == 0 or plain_worst * ep_size / total < imbalance_threshold:
        return BALANCED, _home(tokens_E, instance_rank_I), 0.0
    target = _target(total, plain_worst, ep_size, capacity_factor, chunk)
    if plain_worst <= target:
        return BALANCED, _home(tokens_E, instance_rank_I), 0.0

    has_costs = len(curve_s) > 0
    node_R = np.arange(ep_size) // ranks_per_node
    tables = Tables(instance_expert_I, instance_rank_I, rank_starts, rank_instances, replica_starts, node_R)
    limits = Limits(chunk, most_lends, ranks_per_node, is_node_scope and ranks_per_node < ep_size)
    size_bytes = bytes_per_expert if bytes_per_expert else expert_bytes
    start_s_I = np.zeros(len(instance_rank_I), dtype=np.float64)
    costs = Costs(curve_tokens, curve_s, slopes, figures, start_s_I, size_bytes / expert_bytes, size_bytes)
    work_4R, busy_4R = np.empty((4, ep_size), dtype=np.int64), np.empty((4, ep_size), dtype=np.int64)
    tokens_I = np.zeros(len(instance_rank_I), dtype=np.int64)
    tokens_I[:num_experts] = tokens_E
    levelled_loads, levelled_tokens_I = plain.copy(), tokens_I.copy()
    _level_all(levelled_tokens_I, levelled_loads, tables, target, work_4R[0], work_4R[1])
    lend_slots = slots_R.copy()
    for rank in range(len(free_bytes_R)):
        lend_slots[rank] = min(lend_slots[rank], free_bytes_R[rank] // bytes_per_expert)
    for instance in range(len(tokens_I) if has_costs else 0):
        if tokens_I[instance]:
            start_s_I[instance] = _expert_s(tokens_I[instance], costs)
    by_load = np.arange(ep_size)
    _sort_by(plain, by_load, ep_size)
    start = Start(plain, lend_slots, tokens_I, by_load, levelled_loads, levelled_tokens_I)
    num_lends = min(most_lends, lend_slots.sum())
    hops_3N, times_3R = np.empty((3, num_lends), dtype=np.int64), np.empty((3, ep_size), dtype=np.float64)
    no_keys_R = np.zeros(ep_size, dtype=np.int64)
    states = (
        State(
            plain.copy(),
            lend_slots.copy(),
            tokens_I.copy(),
            np.full(num_experts, -1, dtype=np.int64),
            np.empty((4, num_lends), dtype=np.int64),
            hops_3N,
            times_3R,
            work_4R,
            busy_4R,
            no_keys_R,
        ),
        State(
            levelled_loads.copy(),
            lend_slots.copy(),
            levelled_tokens_I.copy(),
            np.full(num_experts, -1, dtype=np.int64),
            np.empty((4, num_lends), dtype=np.int64),
            hops_3N,
            times_3R,
            work_4R,
            busy_4R,
            no_keys_R,
        ),
    )
    tried = Tried(np.zeros((6, MAX_ATTEMPTS), dtype=np.int64), np.array([-1, 0]), np.array([1]))
    tried.columns[3, 0] = levelled_loads.max()
    # The first state holds plain EP, the second one the attempt without lends.
    plain_s = best_s = 0.0
    best = 0
    if has_costs:
        plain_s = best_s = _predicted_s(start, costs, tables, states[0])
        best = -1
        seconds = _predicted_s(start, costs, tables, states[1]) + figures[6]
        if seconds < best_s and tried.columns[3, 0] < plain_worst:
            best_s, best = seconds, 0
    is_asked = has_costs or not is_decode
    if is_asked:
        is_far = not is_node_scope and ranks_per_node < ep_size
        lowest = _search(target, is_far and not has_costs, tried, start, limits, tables, states)
        if has_costs:
            best, best_s = _cheapest(
                lowest, is_far, plain_worst, best, best_s, tried, start, limits, costs, tables, states
            )
        else:
            best = lowest
    if has_costs and plain_s - best_s < figures[8] * plain_s:
        best = -1
    if best < 0 or tried.columns[3, best] >= plain_worst:
        reason = _refusal(plain, total, slots_R, lend_slots, most_lends) if is_asked else NO_GAIN
        return reason, _home(tokens_E, instance_rank_I), 0.0
    state = states[_held(best, -1, tried, start, limits, tables, states)]
    if not has_costs:
        _top_up(tried.columns[4, best], instance_rank_I, state)
    segments = _cut(counts_RE, ranks_per_node, tables, state)
    return LEND if tried.columns[4, best] else REPLICA, segments, plain_s - best_s


@compiled
def _try(
    target: int,
    way: int,
    in_node_first: bool,
    kept: int,
    tried: Tried,
    start: Start,
    limits: Limits,
    tables: Tables,
    states: tuple[State, State],
) -> int:
    """Make an attempt in a state that does not hold the attempt `kept`; its number."""
    number = tried.size[0]
    tried.size[0] += 1
    tried.columns[0, number], tried.columns[1, number], tried.columns[2, number] = target, way, in_node_first
    _held(number, kept, tried, start, limits, tables, states)
    return int(number)


@compiled
def _held(
    number: int, kept: int, tried: Tried, start: Start, limits: Limits, tables: Tables, states: tuple[State, State]
) -> int:
    """Index of the state that holds the attempt; if none does it is made (again), but not over the attempt `kept`."""
    for index in range(2):
        if tried.held[index] == number:
            return index
    index = 1 if tried.held[0] == kept else 0
    tried.held[index] = number
    if number == 0:
        states[index].loads[:] = start.levelled_loads
        states[index].tokens_I[:] = start.levelled_tokens_I
        states[index].first_lend_E[:] = -1
        return index
    target, way, in_node_first = tried.columns[0, number], tried.columns[1, number], tried.columns[2, number] > 0
    worst, lends, far = _relieve(target, way, in_node_first, start, limits, tables, states[index])
    tried.columns[3, number], tried.columns[4, number], tried.columns[5, number] = worst, lends, far
    return index


@compiled
def _search(
    target: int,
    is_far: bool,
    tried: Tried,
    start: Start,
    limits: Limits,
    tables: Tables,
    states: tuple[State, State],
) -> int:
    """The attempt with the fewest lends at the target, else at the lowest load that is reached."""
    level, low, high = target, target, NO_LIMIT
    while True:
        reached = NO_LIMIT
        for way in (FIT, REFILL, SCARCE):
            worst = tried.columns[3, _try(level, way, False, -1, tried, start, limits, tables, states)]
            reached = min(reached, worst)
            if worst <= level:
                break
        high = min(high, reached)
        if reached > level:
            low = level
        if high <= target or high - low <= max(1, target // SEARCH_STEP):
            break
        level = (low + high) // 2
    if is_far:
        _try(max(high, target), FIT, True, tried.size[0] - 1, tried, start, limits, tables, states)
    return _fewest(tried.columns, tried.size[0], target)


@compiled
def _cheapest(
    lowest: int,
    is_far: bool,
    plain_worst: int,
    best: int,
    best_s: float,
    tried: Tried,
    start: Start,
    limits: Limits,
    costs: Costs,
    tables: Tables,
    states: tuple[State, State],
) -> tuple[int, float]:
    """The attempt with the shortest predicted time, and the time: among the best so far, `lowest` and higher ones."""
    reached, worst = tried.columns[3, lowest], tried.columns[3, 0]
    number = lowest
    for rung in range(-1, len(RUNGS_16)):
        if rung >= 0:
            level = reached + (worst - reached) * RUNGS_16[rung] // 16
            if level * (costs.figures[7] * costs.scale) >= best_s:
                break
            number = _try(level, FIT, is_far, best, tried, start, limits, tables, states)
        state = states[_held(number, best, tried, start, limits, tables, states)]
        seconds = _predicted_s(start, costs, tables, state) + costs.figures[6]
        if seconds < best_s and tried.columns[3, number] < plain_worst:
            best_s, best = seconds, number
    return best, best_s


@compiled
def _fewest(tried: Ints, num_tried: int, target: int) -> int:
    lowest = tried[3, :num_tried].min()
    reached = target if lowest <= target else lowest + lowest // SEARCH_STEP
    best = -1
    for number in range(num_tried):
        if tried[3, number] > reached:
            continue
        is_better = best < 0
        for row in (4, 5, 3):
            if is_better or tried[row, number] > tried[row, best]:
                break
            is_better = tried[row, number] < tried[row, best]
        if is_better:
            best = number
    return best


# -- the paper's planner -------------------------------------------------------------------------------------------


@compiled
def _least_loaded(
    counts_RE: Ints,
    slots_R: Ints,
    instance_expert_I: Ints,
    instance_rank_I: Ints,
    rank_starts: Ints,
    rank_instances: Ints,
    replica_starts: Ints,
    free_bytes_R: Ints,
    imbalance_threshold: float,
    capacity_factor: float,
    chunk: int,
    bytes_per_expert: int,
    most_lends: int,
    ranks_per_node: int,
    is_node_scope: bool,
) -> tuple[int, Ints]:
    """least_loaded.plan_least_loaded: (index of the decision, segments)."""
    ep_size, num_experts = counts_RE.shape
    tokens_E = np.empty(num_experts, dtype=np.int64)
    if not _sum_counts(counts_RE, tokens_E):
        return REFUSED, np.empty((0, 4), dtype=np.int64)
    plain = np.zeros(ep_size, dtype=np.int64)
    for expert in range(num_experts):
        plain[instance_rank_I[expert]] += tokens_E[expert]
    total, plain_worst = plain.sum(), plain.max()
    if total == 0 or plain_worst * ep_size / total < imbalance_threshold:
        return BALANCED, _home(tokens_E, instance_rank_I)
    capacity = int(np.ceil(capacity_factor * total / ep_size))
    if plain_worst <= capacity:
        return BALANCED, _home(tokens_E, instance_rank_I)
    lend_slots = slots_R.copy()
    for rank in range(len(free_bytes_R)):
        lend_slots[rank] = min(lend_slots[rank], free_bytes_R[rank] // bytes_per_expert)

    node_R = np.arange(ep_size) // ranks_per_node
    tables = Tables(instance_expert_I, instance_rank_I, rank_starts, rank_instances, replica_starts, node_R)
    loads, slots, lends_left = plain.copy(), lend_slots.copy(), most_lends
    num_shares = num_experts + min(most_lends, slots.sum()) + len(instance_rank_I) - num_experts
    shares_2N = np.empty((2, num_shares), dtype=np.int64)  # rank, tokens; an expert's are neighbours, home first
    first_share_E, num_shares_E = np.zeros(num_experts, dtype=np.int64), np.zeros(num_experts, dtype=np.int64)
    holder_R, taker_R = np.full(ep_size, -1, dtype=np.int64), np.full(ep_size, -1, dtype=np.int64)
    order = np.arange(num_experts)
    _sort_by(-tokens_E, order, num_experts)
    size = 0
    for index in range(num_experts):
        expert = int(order[index])
        tokens, home = tokens_E[expert], instance_rank_I[expert]
        if tokens == 0:
            break
        loads[home] -= tokens
        left = tokens - min(tokens, max(capacity - loads[home], 0))
        first, last = _replicas(expert, tables)
        for instance in range(first, last):
            holder_R[instance_rank_I[instance]] = expert
        home_share = size
        first_share_E[expert] = size
        shares_2N[0, size] = home
        size += 1
        spilled = 0
        while left >= chunk:
            helper = -1
            for rank in range(ep_size):
                if rank == home:
                    continue
                is_able = holder_R[rank] == expert or taker_R[rank] == expert
                if not is_able and lends_left > 0 and slots[rank] > 0:
                    is_able = not is_node_scope or node_R[rank] == node_R[home]
                if is_able and (helper < 0 or loads[rank] < loads[helper]):
                    helper = rank
            if helper < 0:
                break
            count = min(left, capacity - loads[helper])
            if count < chunk:
                count = left
            if taker_R[helper] != expert:
                if holder_R[helper] != expert:
                    slots[helper] -= 1
                    lends_left -= 1
                taker_R[helper] = expert
                shares_2N[0, size] = helper
                shares_2N[1, size] = 0
                size += 1
            share = home_share + 1
            while shares_2N[0, share] != helper:
                share += 1
            shares_2N[1, share] += count
            loads[helper] += count
            left -= count
            spilled += count
        shares_2N[1, home_share] = tokens - spilled
        loads[home] += tokens - spilled
        num_shares_E[expert] = size - home_share
    if size == np.count_nonzero(tokens_E):
        return _refusal(plain, total, slots_R, lend_slots, most_lends), _home(tokens_E, instance_rank_I)
    if loads.max() >= plain_worst:
        return NO_GAIN, _home(tokens_E, instance_rank_I)
    segments = np.empty((size, 4), dtype=np.int64)
    num_segments = 0
    for expert in range(num_experts):
        start = 0
        for share in range(first_share_E[expert], first_share_E[expert] + num_shares_E[expert]):
            if shares_2N[1, share]:
                segments[num_segments, 0] = expert
                segments[num_segments, 1] = shares_2N[0, share]
                segments[num_segments, 2] = start
                start += shares_2N[1, share]
                segments[num_segments, 3] = start
                num_segments += 1
    return LEND if lends_left < most_lends else REPLICA, segments[:num_segments].copy()


# -- from Python ---------------------------------------------------------------------------------------------------


def plan_quota(counts_RE: Ints, placement: Placement, options: PlanOptions) -> Plan:
    """The same plan as `quota.plan_quota`'s. counts_RE: int64, C order, writeable (one type, so compiled once)."""
    arrays, model = placement.arrays, options.cost_model
    curve_tokens, curve_s, slopes, figures, expert_bytes = NO_COSTS if model is None else _costs(model)
    number, segments, gain_s = _plan(
        counts_RE,
        *arrays,
        options.free_bytes_R,
        curve_tokens,
        curve_s,
        slopes,
        figures,
        expert_bytes,
        float(options.imbalance_threshold),
        float(options.capacity_factor),
        options.min_chunk_tokens,
        options.bytes_per_expert,
        max_lends(options),
        options.ranks_per_node or placement.ep_size,
        options.lend_scope == "node",
        options.phase == "decode",
    )
    return _plan_of(number, counts_RE, placement, segments, options.ranks_per_node, gain_s)


NO_COSTS = (NO_INTS, NO_FLOATS, NO_FLOATS, NO_FLOATS, 1)


def plan_least_loaded(counts_RE: Ints, placement: Placement, options: PlanOptions) -> Plan:
    """The same plan as `least_loaded.plan_least_loaded`'s; counts_RE as for plan_quota."""
    number, segments = _least_loaded(
        counts_RE,
        *placement.arrays,
        options.free_bytes_R,
        float(options.imbalance_threshold),
        float(options.capacity_factor),
        options.min_chunk_tokens,
        options.bytes_per_expert,
        max_lends(options),
        options.ranks_per_node or placement.ep_size,
        options.lend_scope == "node",
    )
    return _plan_of(number, counts_RE, placement, segments, options.ranks_per_node, 0.0)


def _plan_of(
    number: int, counts_RE: Ints, placement: Placement, segments: Ints, ranks_per_node: int | None, gain_s: float
) -> Plan:
    if number == REFUSED:
        refuse_counts(counts_RE)
    per_node = ranks_per_node if number in (LEND, REPLICA) else None
    return Plan(DECISIONS[number], placement, segments, ranks_per_node=per_node, predicted_gain_s=gain_s)


def _costs(model: CostModel) -> tuple[Ints, Floats, Floats, Floats, int]:
    return model.curve_tokens, model.curve_s, model.curve_slopes, model.figures, model.expert_bytes


def warm_up() -> None:
    """Compile, or load what an earlier start left on disk. From then on nothing is compiled any more."""
    counts_RE, placement = np.array([[8, 0], [8, 0]], dtype=np.int64), Placement.linear(2, 2, 1)
    for plan in (plan_quota, plan_least_loaded):
        plan(counts_RE, placement, PlanOptions(min_chunk_tokens=1))
    for function in (_plan, _least_loaded):
        cast(Any, function).disable_compile()


numba.config.CACHE_DIR = _others_cache
