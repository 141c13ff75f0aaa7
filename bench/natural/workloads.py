"""Prompts of one domain, of all of them mixed, or shifting from one to the next, as tokens of the trained model."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from llep.training.text import Domain, find_domains

PROMPT_TOKENS = 250
PROMPT_CHARACTERS = 3000  # enough for PROMPT_TOKENS of any text
MIXED, SHIFTING = "mixed", "shifting"


class Workloads:
    """`names`: each domain, mixed, shifting. The same seed gives the same prompts."""

    def __init__(self, model: Path, seed: int = 1) -> None:
        self._domains = {domain.name: domain for domain in find_domains([], seed)}
        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._seed = seed
        self.names = (*self._domains, MIXED, SHIFTING)

    def prompts(self, name: str, count: int) -> Iterator[list[int]]:
        """`count` prompts of PROMPT_TOKENS tokens; shifting goes once through all domains."""
        rng = random.Random(f"{self._seed} {name}")
        domains = list(self._domains.values())
        for index in range(count):
            if name == MIXED:
                domain = rng.choice(domains)
            elif name == SHIFTING:
                place, into = divmod(index * len(domains) / count, 1.0)
                domain = domains[(int(place) + (rng.random() < max(0.0, 2.0 * into - 1.0))) % len(domains)]
            else:
                domain = self._domains[name]
            yield self._passage(domain, rng)

    def _passage(self, domain: Domain, rng: random.Random) -> list[int]:
        while True:
            piece = rng.choice(domain.trained)
            start = rng.randrange(max(len(piece) - PROMPT_CHARACTERS, 1))
            tokens = self._tokenizer.encode(piece[start : start + PROMPT_CHARACTERS], add_special_tokens=False).ids
            if len(tokens) >= PROMPT_TOKENS:
                return list(tokens[:PROMPT_TOKENS])
