"""What a tiny model is made of: every option, its default, its rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from llep.errors import SettingsError

HEAD_DIM = 64
SIZE_MULTIPLE = 32  # vLLM's CPU kernels want hidden and intermediate sizes in multiples of it
HARMONY_VOCAB = 201088  # with fewer, vLLM's chat for gpt-oss sends token ids that the model doesn't have
MAX_EXPERTS = 1024
MAX_BIAS = 1000.0


class Kind(StrEnum):
    GPT_OSS = "gpt-oss"
    DEEPSEEK = "deepseek"
    QWEN3 = "qwen3"


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Sizes, seed and skew of a tiny model. Raises SettingsError naming the value, the rule and the way out."""

    kind: Kind
    layers: int = 4
    hidden: int = 64
    intermediate: int = 64  # of one expert
    experts: int = 16
    top_k: int = 4
    heads: int = 4
    kv_heads: int | None = None  # half of the heads; DeepSeek has none of its own
    groups: int | None = None  # DeepSeek: expert groups, half of which a token may choose from
    vocab: int | None = None  # gpt-oss: 201088, which chat needs; else 2048
    max_positions: int = 8192
    seed: int = 0
    dtype: Dtype = Dtype.FLOAT32
    hot: tuple[int, ...] = ()  # experts that get more than their share, in every layer
    hot_share: float | None = None  # share of all pairs that goes to the hot experts
    hot_bias: float | None = None  # what is added to the hot experts' scores instead
    reply_tokens: int = 500  # mean length of a reply before the model ends it; 0 is never

    def __post_init__(self) -> None:
        _between("layers", self.layers, 2 if self.kind is Kind.DEEPSEEK else 1, 200)
        _between("hidden", self.hidden, 64, 65536)
        _between("intermediate", self.intermediate, 32, 65536)
        _between("experts", self.experts, 2, MAX_EXPERTS)
        _between("top-k", self.top_k, 1, self.experts, "the number of experts")
        _between("heads", self.heads, 1, 1024)
        _between("max-positions", self.max_positions, 64, 1 << 20)
        _between("seed", self.seed, 0, (1 << 63) - 1)
        _between("reply-tokens", self.reply_tokens, 0, 1 << 20)
        _multiple("hidden", self.hidden, SIZE_MULTIPLE)
        _multiple("intermediate", self.intermediate, SIZE_MULTIPLE)
        _multiple("max-positions", self.max_positions, 64)
        self._check_heads()
        self._check_groups()
        self._check_hot()
        if self.vocab is not None:
            _between("vocab", self.vocab, 512, 1 << 20)

    def _check_heads(self) -> None:
        if self.kv_heads is None:
            return
        if self.kind is Kind.DEEPSEEK:
            raise _refuse("kv-heads", self.kv_heads, "DeepSeek's heads share one latent: leave --kv-heads out")
        _between("kv-heads", self.kv_heads, 1, self.heads, "the number of heads")
        if self.heads % self.kv_heads:
            raise _refuse("kv-heads", self.kv_heads, f"it must divide the number of heads, {self.heads}")

    def _check_groups(self) -> None:
        if self.kind is not Kind.DEEPSEEK:
            if self.groups is not None:
                raise _refuse("groups", self.groups, "only DeepSeek has expert groups: leave --groups out")
            return
        groups = self.expert_groups
        if groups < 1 or self.experts % groups or (groups > 1 and self.experts // groups < 2):
            rule = f"it must divide the number of experts, {self.experts}, into groups of 2 or more; try --groups 1"
            raise _refuse("groups", groups, rule)
        reachable = self.experts // groups * self.chosen_groups
        if self.top_k > reachable:
            rule = f"a token chooses from {self.chosen_groups} of {groups} groups, {reachable} experts; try --groups 1"
            raise _refuse("top-k", self.top_k, rule)

    def _check_hot(self) -> None:
        for name, value in (("hot-share", self.hot_share), ("hot-bias", self.hot_bias)):
            if value is not None and not self.hot:
                raise _refuse(name, value, "it needs to know which experts are hot: give --hot, such as --hot 0-7")
        if self.hot_share is not None and self.hot_bias is not None:
            raise _refuse("hot-bias", self.hot_bias, "--hot-share already says how hot: give one of the two")
        for expert in self.hot:
            if not 0 <= expert < self.experts:
                raise _refuse("hot", expert, f"the experts are 0 to {self.experts - 1}")
        if len(set(self.hot)) == self.experts:
            raise _refuse("hot", f"{len(self.hot)} experts", "all experts are hot, so none is: name fewer")
        if self.hot_bias is not None and not abs(self.hot_bias) <= MAX_BIAS:
            raise _refuse("hot-bias", self.hot_bias, f"it must be between {-MAX_BIAS:g} and {MAX_BIAS:g}")
        if self.hot_share is not None:
            lowest, highest = self.hot_share_range
            if not lowest <= self.hot_share <= highest:
                rule = (
                    f"{len(self.hot)} of {self.experts} experts can get {lowest:.2f} to {highest:.2f} of the pairs "
                    f"with top-k {self.top_k}; change --hot-share or --hot"
                )
                raise _refuse("hot-share", self.hot_share, rule)

    @property
    def hot_share_range(self) -> tuple[float, float]:
        """The least and the most that the hot experts can get: an expert is chosen once per token at most."""
        cold = self.experts - len(self.hot)
        return max(0.0, 1 - cold / self.top_k), min(1.0, len(self.hot) / self.top_k)

    @property
    def expert_groups(self) -> int:
        if self.groups is not None:
            return self.groups
        return 4 if self.experts % 4 == 0 and self.experts >= 8 else 1

    @property
    def chosen_groups(self) -> int:
        return max(1, self.expert_groups // 2)

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or (self.heads // 2 if self.heads % 2 == 0 else self.heads)

    @property
    def vocab_size(self) -> int:
        return self.vocab or (HARMONY_VOCAB if self.kind is Kind.GPT_OSS else 2048)

    @property
    def has_harmony(self) -> bool:
        return self.kind is Kind.GPT_OSS and self.vocab_size >= HARMONY_VOCAB


def parse_experts(text: str) -> tuple[int, ...]:
    """'0-3,6' -> (0, 1, 2, 3, 6). Raises SettingsError for anything but numbers and ranges."""
    experts: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise _refuse("hot", text, "give expert numbers and ranges, such as 0,1 or 0-7")
        if int(last or first) >= MAX_EXPERTS:
            raise _refuse("hot", text, f"no model here has more than {MAX_EXPERTS} experts")
        experts.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(experts))


def _between(name: str, value: int, lowest: int, highest: int, what: str = "") -> None:
    if not isinstance(value, int) or not lowest <= value <= highest:
        raise _refuse(name, value, f"it must be a whole number from {lowest} to {highest}{what and f', {what}'}")


def _multiple(name: str, value: int, factor: int) -> None:
    if value % factor:
        below = value // factor * factor
        rule = f"it must be a multiple of {factor}; the nearest are {below} and {below + factor}"
        raise _refuse(name, value, rule)


def _refuse(name: str, value: Any, rule: str) -> SettingsError:
    return SettingsError(f"--{name} {value} is not possible: {rule}", param=name)


def numbers(experts: Iterable[int]) -> str:
    """(0, 1, 2, 3, 6) -> '0-3,6'."""
    parts: list[list[int]] = []
    for expert in sorted(experts):
        if parts and parts[-1][-1] == expert - 1:
            parts[-1].append(expert)
        else:
            parts.append([expert])
    return ",".join(f"{p[0]}" if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
