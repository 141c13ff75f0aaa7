"""How a trained model does on text it has never seen: loss, skew by domain and layer, a sample of its writing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from llep.training.data import TokenDomain, held_out_batch
from llep.training.routing import Counts, Routing, ratios

SEQUENCES = 16  # of each domain
AT_ONCE = 4
PROMPT_TOKENS, SAMPLE_TOKENS = 64, 64
TEMPERATURE = 0.6


@dataclass(frozen=True, slots=True)
class DomainReport:
    """counts_LE: pairs of each MoE layer and expert over the held-out text."""

    name: str
    tokens: int
    loss: float
    counts_LE: Counts
    prompt: str
    sample: str

    def as_dict(self) -> dict[str, Any]:
        return {
            "domain": self.name,
            "tokens": self.tokens,
            "loss": round(self.loss, 4),
            "imbalance_ratio_by_ranks_and_layer": {
                str(ranks): [round(ratio, 3) for ratio in of_layers]
                for ranks, of_layers in ratios(self.counts_LE).items()
            },
            "hottest_expert_by_layer": self.counts_LE.argmax(axis=1).tolist(),
            "prompt": self.prompt,
            "sample": self.sample,
        }


@torch.no_grad()
def judge(
    model: Any, routing: Routing, domains: Sequence[TokenDomain], tokenizer: Tokenizer, sequence: int, seed: int
) -> list[DomainReport]:
    """One report per domain, from sequences as long as those of training."""
    model.eval()
    torch.manual_seed(seed)
    return [_judge(model, routing, domain, tokenizer, sequence) for domain in domains]


def _judge(model: Any, routing: Routing, domain: TokenDomain, tokenizer: Tokenizer, sequence: int) -> DomainReport:
    tokens = held_out_batch(domain, SEQUENCES, sequence)
    losses, counts_LE = [], None
    for rows in torch.split(tokens, AT_ONCE):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        losses += cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").reshape(-1).tolist()
        counts_LE = routing.counts() if counts_LE is None else counts_LE + routing.counts()
    assert counts_LE is not None
    prompt = tokens[len(tokens) // 2, :PROMPT_TOKENS]
    said = _write(model, prompt)
    return DomainReport(
        domain.name,
        len(losses),
        float(np.mean(losses)),
        counts_LE,
        tokenizer.decode(prompt.tolist(), skip_special_tokens=False),
        tokenizer.decode(said, skip_special_tokens=False),
    )


def _write(model: Any, prompt: torch.Tensor) -> list[int]:
    """Tokens that the model goes on with, at a low temperature."""
    tokens = prompt.tolist()
    for _ in range(SAMPLE_TOKENS):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(torch.multinomial(torch.softmax(logits / TEMPERATURE, dim=-1), 1)))
    return tokens[len(prompt) :]
