"""Random tensors, each drawn from the seed and its own name: changing one option leaves the others as they were.

Some dimensions of the hidden state are reserved: embeddings set them and no layer writes to them, so that they mean the
same in every layer. With them the model can do exact things that random weights never would.

Shape letters: V vocabulary, H hidden, I intermediate of one expert, E experts, Q attention heads x head size.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

# The reserved dimensions.
CONSTANT = 0  # 1 for every token
CHAIN = slice(1, 4)  # gpt-oss: marks the tokens that open a reply in harmony's format
ENDER = 4  # marks the tokens after which the model ends its reply
RESERVED = 5

MARK = 8.0  # what a marked token has in its dimension
ROUTER_STD = 1.0  # of router logits
LOGIT_STD = 3.0  # of output logits: top-1 margins of about 0.7, far above float32 noise
BLOCK_STD = 0.5  # what attention and experts each add to a hidden state, whose embedding has 1
BIAS_STD = 0.1


@dataclass(frozen=True, slots=True)
class Tensor:
    """mean + std * normal of this shape, then `finish` in place."""

    shape: tuple[int, ...]
    std: float
    mean: float = 0.0
    finish: Callable[[Floats], None] | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def draw(self, name: str, seed: int) -> Floats:
        if self.std:
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            array = rng.standard_normal(self.shape, dtype=np.float32)
            array *= np.float32(self.std)
            array += np.float32(self.mean)
        else:
            array = np.full(self.shape, self.mean, dtype=np.float32)
        if self.finish is not None:
            self.finish(array)
        return array


def ones(size: int) -> Tensor:
    return Tensor((size,), 0.0, 1.0)


def reads(out_size: int, in_size: int, out_std: float = 1.0) -> Tensor:
    """A matrix [out, in] that makes outputs of `out_std` from inputs of 1."""
    return Tensor((out_size, in_size), out_std / math.sqrt(in_size))


def writes(hidden: int, in_size: int, out_std: float, in_std: float = 1.0) -> Tensor:
    """A matrix [H, in] into the hidden state: `out_std` from inputs of `in_std`, nothing into reserved dimensions."""
    return Tensor((hidden, in_size), out_std / in_std / math.sqrt(in_size), finish=_no_reserved_rows)


def _no_reserved_rows(array: Floats) -> None:
    array[:RESERVED] = 0


def no_reserved_columns(array: Floats) -> None:
    array[..., :RESERVED] = 0


def router(experts: int, hidden: int, push: Floats | None = None) -> Tensor:
    """The router [E, H], deaf to reserved dimensions; `push` [E] is what it adds per unit of the constant one."""

    def finish(array: Floats) -> None:
        no_reserved_columns(array)
        if push is not None:
            array[:, CONSTANT] = push

    return Tensor((experts, hidden), ROUTER_STD / math.sqrt(hidden), finish=finish)


def embedding(vocab: int, hidden: int, marks: dict[int, list[int]]) -> Tensor:
    """[V, H]. marks: dimension -> the tokens that carry it."""

    def finish(array: Floats) -> None:
        no_reserved_columns(array)
        array[:, CONSTANT] = 1
        for dimension, tokens in marks.items():
            array[tokens, dimension] = MARK

    return Tensor((vocab, hidden), 1.0, finish=finish)


def output_head(vocab: int, hidden: int, spoken: list[int], answers: dict[int, int]) -> Tensor:
    """[V, H]. spoken: the tokens that the model may say at random. answers: dimension -> the token said after its mark.

    Rows of spoken tokens have one length, so that each is as likely as the others; the rest are out of reach of greedy
    decoding and of sampling, but for the answers.
    """

    def finish(array: Floats) -> None:
        no_reserved_columns(array)
        rows = array[spoken]
        array[:] = 0
        array[:, CONSTANT] = -10 * LOGIT_STD
        array[spoken] = rows * (LOGIT_STD / np.linalg.norm(rows, axis=1, keepdims=True))
        for dimension, token in answers.items():
            array[token, dimension] = 10 * LOGIT_STD

    return Tensor((vocab, hidden), 1.0, finish=finish)
