"""What a plan costs: predicted seconds of compute, of lending and of planning, from a small file of measured curves.

A rank's time is its own experts' work, then that of the experts lent to it, which can't start before their weights are
there; a layer's time is the slowest rank's. An expert's work is read off a curve of seconds against tokens, measured
for one expert of `expert_bytes` and scaled with the bytes of the expert at hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import yaml

from llep.errors import SettingsError
from llep.plan import Plan, Transfer, node_of

FILE_HEADER = """\
# llep cost model. Seconds and bytes; read with --cost-model FILE, measured with `llep calibrate`.
# gemm_curve: [tokens, seconds] of one expert whose weights are expert_bytes; linear in between.
# gemm_launch_s: once per rank and bank of weights (its own, the lent ones). plan_s: one step plan.
# overlap_ratio: share of a rank's own work behind which arriving weights can hide, 0 to 1.
# margin_ratio: share of plain EP's time that a plan must be predicted to save, for predictions are not exact.
"""


@dataclass(frozen=True, slots=True)
class Link:
    """One rank's port to the others: n bytes take latency_s + n / bytes_per_s, each way at once."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Measured or published costs of one kind of device. SettingsError for what is NaN, negative or out of order."""

    name: str
    source: str  # where the figures come from
    expert_bytes: int
    gemm_curve: tuple[tuple[int, float], ...]
    gemm_launch_s: float
    node_link: Link
    network_link: Link
    plan_s: float
    overlap_ratio: float = 0.0
    margin_ratio: float = 0.02

    def __post_init__(self) -> None:
        if not isinstance(self.expert_bytes, int) or self.expert_bytes < 1:
            raise SettingsError(
                f"expert_bytes must be an integer >= 1, got {self.expert_bytes!r}", param="expert_bytes"
            )
        for name, value in (
            ("gemm_launch_s", self.gemm_launch_s),
            ("plan_s", self.plan_s),
            ("node_link.latency_s", self.node_link.latency_s),
            ("network_link.latency_s", self.network_link.latency_s),
        ):
            _check(name, value, "a number of seconds >= 0", _is_number(value) and value >= 0)
        for name, link in (("node_link", self.node_link), ("network_link", self.network_link)):
            is_rate = _is_number(link.bytes_per_s) and link.bytes_per_s > 0
            _check(f"{name}.bytes_per_s", link.bytes_per_s, "a number > 0", is_rate)
        for name, ratio in (("overlap_ratio", self.overlap_ratio), ("margin_ratio", self.margin_ratio)):
            _check(name, ratio, "a number in 0..1", _is_number(ratio) and 0 <= ratio <= 1)
        self._check_curve()

    def _check_curve(self) -> None:
        previous = (0, 0.0)
        for point in self.gemm_curve:
            _check("gemm_curve", point, "pairs [tokens, seconds]", len(point) == 2 and all(map(_is_number, point)))
            is_after = isinstance(point[0], int) and point[0] > previous[0] and point[1] >= previous[1]
            _check(
                "gemm_curve", point, f"increasing tokens and seconds that do not fall; {previous} is before", is_after
            )
            previous = point
        _check("gemm_curve", self.gemm_curve, "at least 2 points", len(self.gemm_curve) >= 2)

    @cached_property
    def already_planned(self) -> CostModel:
        """The same where a plan is made in any case: to follow it costs no more time."""
        return replace(self, plan_s=0.0)

    @cached_property
    def curve_tokens(self) -> npt.NDArray[np.int64]:
        return np.array([tokens for tokens, _ in self.gemm_curve], dtype=np.int64)

    @cached_property
    def curve_s(self) -> npt.NDArray[np.float64]:
        return np.array([seconds for _, seconds in self.gemm_curve], dtype=np.float64)

    @cached_property
    def curve_slopes(self) -> npt.NDArray[np.float64]:
        """Seconds per token from each point on; the last slope goes on for ever."""
        slopes = np.diff(self.curve_s) / np.diff(self.curve_tokens)
        return np.append(slopes, slopes[-1])

    @cached_property
    def least_token_s(self) -> float:
        """Seconds per token where the curve is at its best: no load can be worked off faster."""
        return min(float(self.curve_slopes[-1]), *(seconds / tokens for tokens, seconds in self.gemm_curve))

    @cached_property
    def figures(self) -> npt.NDArray[np.float64]:
        """What native.py reads, in the order of its Costs.figures."""
        links = [(link.latency_s, link.bytes_per_s) for link in (self.node_link, self.network_link)]
        return np.array(
            [
                self.gemm_launch_s,
                *links[0],
                *links[1],
                self.overlap_ratio,
                self.plan_s,
                self.least_token_s,
                self.margin_ratio,
            ]
        )

    def scale(self, bytes_per_expert: int) -> float:
        """What the curve is multiplied with for an expert of that size; 0 is the curve's own."""
        return (bytes_per_expert or self.expert_bytes) / self.expert_bytes

    def expert_s(self, tokens: int, bytes_per_expert: int = 0) -> float:
        """Seconds of one expert's work on a rank, without the launch; bytes_per_expert 0 is the curve's own."""
        if tokens <= 0:
            return 0.0
        points, index = self.gemm_curve, 0
        while index + 1 < len(points) and points[index + 1][0] <= tokens:
            index += 1
        start, seconds = points[index]
        return (seconds + float(self.curve_slopes[index]) * max(tokens - start, 0)) * self.scale(bytes_per_expert)

    def dump(self, path: Path) -> None:
        """Write the file that `load` reads."""
        values = asdict(self)
        values["gemm_curve"] = [list(point) for point in self.gemm_curve]
        path.write_text(FILE_HEADER + yaml.safe_dump(values, sort_keys=False))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that `dump` wrote, by hand or by `llep calibrate`. SettingsError names what is wrong in it."""
        try:
            return cls._parse(yaml.safe_load(path.read_text()))
        except (OSError, UnicodeDecodeError, yaml.YAMLError, SettingsError) as error:
            raise SettingsError(f"cost model {path}: {error}", param="cost_model") from None

    @classmethod
    def _parse(cls, values: Any) -> Self:
        if not isinstance(values, dict):
            raise SettingsError(f"must hold 'key: value' lines, got {type(values).__name__}")
        values = dict(values)
        _check_keys(values, {field.name for field in fields(cls)}, {"overlap_ratio", "margin_ratio"}, "")
        for name in ("node_link", "network_link"):
            if not isinstance(values[name], dict):
                raise SettingsError(f"{name} must have the keys latency_s and bytes_per_s, got {values[name]!r}")
            _check_keys(values[name], {field.name for field in fields(Link)}, set(), f"{name}.")
            values[name] = Link(**{key: _number(value) for key, value in values[name].items()})
        if not isinstance(values["gemm_curve"], list) or not all(isinstance(p, list) for p in values["gemm_curve"]):
            raise SettingsError(f"gemm_curve must be a list of [tokens, seconds], got {values['gemm_curve']!r}")
        values["gemm_curve"] = tuple(tuple(map(_number, point)) for point in values["gemm_curve"])
        for name in {"gemm_launch_s", "plan_s", "overlap_ratio", "margin_ratio"} & set(values):
            values[name] = _number(values[name])
        return cls(**values)


def cost_model(name: str) -> CostModel:
    """The preset of that name (h100, h200, b200), or the model in the file of that path."""
    if name.lower() in PRESETS:
        return PRESETS[name.lower()]
    if not Path(name).is_file():
        raise SettingsError(
            f"cost model {name!r} is neither a preset ({', '.join(PRESETS)}) nor a file; `llep calibrate` writes one",
            param="cost_model",
        )
    return CostModel.load(Path(name))


def predict_s(plan: Plan, model: CostModel, bytes_per_expert: int = 0) -> float:
    """Seconds of one layer under a plan, all ranks together: the slowest rank, and planning unless it is plain EP."""
    placement = plan.placement
    shares: list[dict[int, int]] = [{} for _ in range(placement.num_experts)]
    for expert, rank, start, stop in plan.segments_S4.tolist():
        shares[expert][rank] = shares[expert].get(rank, 0) + stop - start
    step_s = layer_s(
        shares, placement.holders, plan.transfers, placement.ep_size, plan.ranks_per_node, model, bytes_per_expert
    )
    is_home = all(set(of) <= {home} for of, home in zip(shares, placement.home_rank, strict=True))
    return step_s if is_home else step_s + model.plan_s


def layer_s(
    shares: Sequence[Mapping[int, int]],
    holders: Sequence[Sequence[int]],
    transfers: Sequence[Transfer],
    ep_size: int,
    ranks_per_node: int | None,
    model: CostModel,
    bytes_per_expert: int,
) -> float:
    """Seconds of one layer without planning. shares[expert][rank]: tokens; holders[expert]: ranks with the weights."""
    own_s, lent_s = [0.0] * ep_size, [0.0] * ep_size
    for of_expert, with_weights in zip(shares, holders, strict=True):
        for rank, tokens in of_expert.items():
            bank_s = own_s if rank in with_weights else lent_s
            if tokens and not bank_s[rank]:
                bank_s[rank] = model.gemm_launch_s
            bank_s[rank] += model.expert_s(tokens, bytes_per_expert)
    arrival_s = arrivals_s(transfers, ep_size, ranks_per_node, model, bytes_per_expert or model.expert_bytes)
    return max(
        own + lent + max(arrival - model.overlap_ratio * own, 0.0)
        for own, lent, arrival in zip(own_s, lent_s, arrival_s, strict=True)
    )


def arrivals_s(
    transfers: Sequence[Transfer], ep_size: int, ranks_per_node: int | None, model: CostModel, size_bytes: int
) -> list[float]:
    """When each rank has its last lend. A round lasts as long as its busiest port, and the next one waits for it."""
    arrival_s, now_s = [0.0] * ep_size, 0.0
    for round_ in range(max((hop.round for hop in transfers), default=-1) + 1):
        busy: dict[tuple[bool, bool, int], int] = {}
        hops = [hop for hop in transfers if hop.round == round_]
        for hop in hops:
            in_node = node_of(hop.src_rank, ranks_per_node) == node_of(hop.dst_rank, ranks_per_node)
            for port in ((in_node, True, hop.src_rank), (in_node, False, hop.dst_rank)):
                busy[port] = busy.get(port, 0) + 1
        now_s += max(_transfer_s(count, in_node, model, size_bytes) for (in_node, _, _), count in busy.items())
        for hop in hops:
            arrival_s[hop.dst_rank] = now_s
    return arrival_s


def _transfer_s(count: int, in_node: bool, model: CostModel, size_bytes: int) -> float:
    link = model.node_link if in_node else model.network_link
    return link.latency_s + count * size_bytes / link.bytes_per_s


def _number(value: Any) -> Any:
    """YAML reads 5e-6 (no dot) as text; people write it all the same."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check(name: str, value: Any, rule: str, is_valid: bool) -> None:
    if not is_valid:
        raise SettingsError(f"{name} must be {rule}, got {value!r}", param=name.partition(".")[0])


def _check_keys(values: Mapping[str, Any], known: set[str], optional: set[str], prefix: str) -> None:
    if unknown := sorted(set(values) - known):
        raise SettingsError(f"unknown key {prefix}{unknown[0]}; known are {', '.join(sorted(known))}")
    if missing := sorted(known - optional - set(values)):
        raise SettingsError(f"{prefix}{missing[0]} is missing")


def _roofline(
    name: str, source: str, flops_per_s: float, memory_bytes_per_s: float, link_bytes_per_s: float
) -> CostModel:
    """A preset from peak figures: 70% of them for GEMMs, 80% for memory and links; bf16 weights and a 3 GEMM expert."""
    expert_bytes = 3 * 7168 * 2048 * 2  # DeepSeek-V3's, in bf16
    read_s = expert_bytes / (0.8 * memory_bytes_per_s)
    token_s = expert_bytes / (0.7 * flops_per_s)  # 2 FLOPs per weight and token, 2 bytes per weight
    knee = math.ceil(read_s / token_s)
    return CostModel(
        name=name,
        source=f"{source}; 70% of the peak for GEMMs, 80% for memory and links",
        expert_bytes=expert_bytes,
        gemm_curve=((1, read_s), (knee, knee * token_s), (64 * knee, 64 * knee * token_s)),
        gemm_launch_s=10e-6,
        node_link=Link(5e-6, 0.8 * link_bytes_per_s),
        network_link=Link(15e-6, 0.8 * 50e9),
        plan_s=50e-6,
    )


# Dense bf16, HBM, NVLink each way; network: one 400 Gb/s port per GPU, as in DGX H100 and DGX B200.
PRESETS = {
    model.name: model
    for model in (
        _roofline(
            "h100", "NVIDIA H100 SXM datasheet: 989 TFLOPS, 3.35 TB/s, 450 GB/s each way", 989e12, 3.35e12, 450e9
        ),
        _roofline("h200", "NVIDIA H200 SXM datasheet: 989 TFLOPS, 4.8 TB/s, 450 GB/s each way", 989e12, 4.8e12, 450e9),
        _roofline("b200", "NVIDIA HGX B200 datasheet: 2250 TFLOPS, 8 TB/s, 900 GB/s each way", 2250e12, 8e12, 900e9),
    )
}
