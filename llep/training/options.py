"""What is trained, for how long and how: every option, its default, its rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llep.errors import SettingsError
from llep.tiny_models.options import Kind, Options

# A gpt-oss of this size learns to write recognisable text in five minutes on two cores.
SIZES: dict[str, Any] = {"layers": 4, "hidden": 192, "intermediate": 192, "experts": 32, "top_k": 4, "vocab": 4096}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """SettingsError names the value, the rule and the way out."""

    model: Options
    minutes: float = 5.0  # of training, over all its runs; how many steps that are is found out on the way
    steps: int | None = None  # instead of minutes: the same seed then gives the same model
    batch: int = 8  # sequences of a step, taken from the domains in turn
    sequence: int = 256  # tokens
    learning_rate: float = 3e-3
    balance: float = 0.002  # weight of the loss that evens out experts; raising it leaves less skew
    text: tuple[Path, ...] = ()  # one domain per path; what this machine has if empty

    def __post_init__(self) -> None:
        _between("minutes", self.minutes, 0.01, 10_000)
        _between("steps", 1 if self.steps is None else self.steps, 1, 10_000_000)
        _between("batch", self.batch, 1, 4096)
        _between("sequence", self.sequence, 16, self.model.max_positions)
        _between("learning-rate", self.learning_rate, 1e-6, 1.0)
        _between("balance", self.balance, 0.0, 10.0)

    def identity(self) -> dict[str, Any]:
        """What two runs must have alike to be one training."""
        model = {key: value for key, value in asdict(self.model).items() if key not in ("hot", "hot_share", "hot_bias")}
        return {
            **model,
            "kind": self.model.kind.value,
            "dtype": self.model.dtype.value,
            "batch": self.batch,
            "sequence": self.sequence,
            "learning_rate": self.learning_rate,
            "balance": self.balance,
        }


def parse_options(kind: str, text: Sequence[Path], sizes: dict[str, Any], **training: Any) -> TrainOptions:
    """Sizes that are None take SIZES' values, or the tiny models' defaults."""
    if kind not in list(Kind):
        raise SettingsError(f"unknown kind of model {kind!r}; the kinds are {', '.join(Kind)}", param="kind")
    given = {key: value for key, value in sizes.items() if value is not None}
    return TrainOptions(model=Options(kind=Kind(kind), **{**SIZES, **given}), text=tuple(text), **training)


def _between(name: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        raise SettingsError(
            f"--{name} {value:g} is not possible: it must be between {lowest:g} and {highest:g}", param=name
        )
