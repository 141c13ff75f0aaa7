"""Domains of text as tokens, and the batches of each step: a pure function of the seed and the step's number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer

from llep.training.text import Domain

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TokenDomain:
    name: str
    trained: Tokens
    held_out: Tokens


def encode(domain: Domain, tokenizer: Tokenizer, end: int, least: int) -> TokenDomain:
    """Its pieces one after the other, each followed by the token `end`, repeated until there are `least` tokens."""
    return TokenDomain(
        domain.name,
        _concatenated(domain.trained, tokenizer, end, least),
        _concatenated(domain.held_out, tokenizer, end, least),
    )


def _concatenated(pieces: Sequence[str], tokenizer: Tokenizer, end: int, least: int) -> Tokens:
    encoded = tokenizer.encode_batch(list(pieces), add_special_tokens=False)
    tokens = np.concatenate([np.array([*piece.ids, end], dtype=np.int32) for piece in encoded])
    return np.resize(tokens, max(len(tokens), least))


def batch(domains: Sequence[TokenDomain], seed: int, step: int, size: int, sequence: int) -> torch.Tensor:
    """[size, sequence + 1] tokens: sequences from the domains in turn, each from a random place."""
    rng = np.random.default_rng([seed, step])
    rows = []
    for row in range(size):
        tokens = domains[(step * size + row) % len(domains)].trained
        start = int(rng.integers(0, len(tokens) - sequence))
        rows.append(tokens[start : start + sequence + 1])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def held_out_batch(domain: TokenDomain, size: int, sequence: int) -> torch.Tensor:
    """[up to size, sequence + 1] tokens, spread evenly over what is held out."""
    count = min(size, (len(domain.held_out) - 1) // sequence)
    starts = np.linspace(0, len(domain.held_out) - sequence - 1, count).astype(np.int64)
    rows = [domain.held_out[start : start + sequence + 1] for start in starts]
    return torch.from_numpy(np.stack(rows).astype(np.int64))
