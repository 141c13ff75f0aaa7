"""A training run: the model, its optimizer, how far it is; saved and taken up again at any step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from llep.errors import SettingsError
from llep.tiny_models import architectures
from llep.tiny_models.options import Kind
from llep.training.data import TokenDomain, batch
from llep.training.options import TrainOptions
from llep.training.routing import Routing, ratios

WARM_UP_STEPS = 20
STEADY_SHARE = (4, 5)  # of all steps, before the learning rate falls
LAST_RATE = 0.05  # of the learning rate, at the end
SMOOTHING = 0.9
LARGEST_GRADIENT = 1.0
STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is. total_steps is an estimate until most of the minutes are over."""

    step: int
    total_steps: int | None
    seconds: float
    loss: float  # smoothed over steps
    ratios: dict[int, float]  # ranks -> imbalance ratio of the last step, mean over layers


class Trainer:
    """Trains step by step. With the same options and text, the same model comes out of any number of runs."""

    def __init__(
        self, options: TrainOptions, domains: Sequence[TokenDomain], ends: list[int], text_digest: str
    ) -> None:
        self.options = options
        self.step = 0
        self.seconds = 0.0
        self.loss = 0.0
        self.total_steps = options.steps
        self._domains = domains
        self._identity = {**options.identity(), "text": text_digest}
        torch.manual_seed(options.model.seed)
        self.model = make_model(options, ends)
        self.routing = Routing(self.model)
        self._optimizer = _optimizer(self.model, options.learning_rate)

    @property
    def is_done(self) -> bool:
        return self.total_steps is not None and self.step >= self.total_steps

    def advance(self) -> Progress:
        """One step."""
        start_s = time.monotonic()
        options = self.options
        tokens = batch(self._domains, options.model.seed, self.step, options.batch, options.sequence)
        self.model.train()
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))
        (loss + options.balance * self.routing.balance_loss()).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT)
        for group in self._optimizer.param_groups:
            group["lr"] = options.learning_rate * rate(self.step, self.total_steps)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.loss = loss.item() if self.step == 0 else SMOOTHING * self.loss + (1 - SMOOTHING) * loss.item()
        self.step += 1
        self.seconds += time.monotonic() - start_s
        self._settle_total()
        by_ranks = {ranks: float(np.mean(of_layers)) for ranks, of_layers in ratios(self.routing.counts()).items()}
        return Progress(self.step, self._estimate(), self.seconds, self.loss, by_ranks)

    def _settle_total(self) -> None:
        """When the steady part of the minutes is over, the steps so far say how many there will be."""
        steady, whole = STEADY_SHARE
        if self.total_steps is None and self.seconds >= self.options.minutes * 60 * steady / whole:
            self.total_steps = -(-self.step * whole // steady)

    def _estimate(self) -> int | None:
        if self.total_steps is not None:
            return self.total_steps
        return max(round(self.options.minutes * 60 * self.step / self.seconds), self.step + 1)

    def save(self, path: Path) -> None:
        """Write all that is needed to go on, at once or not at all."""
        state = {
            "version": STATE_VERSION,
            "identity": self._identity,
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss,
            "total_steps": self.total_steps,
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
        }
        unfinished = path.with_name(path.name + ".part")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def load(self, path: Path) -> None:
        """Go on from what was saved. Raises SettingsError if that is another training, or can't be read."""
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True)
            version, identity = state["version"], state["identity"]
        except Exception as error:  # torch raises whatever its unpickler met
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SettingsError(
                f"{path} can't be read ({reason}): remove it to begin anew", param="directory"
            ) from None
        differing = [key for key in self._identity if identity.get(key) != self._identity[key]]
        if version != STATE_VERSION or differing:
            key = differing[0] if differing else "version"
            theirs, ours = (identity.get(key), self._identity.get(key)) if differing else (version, STATE_VERSION)
            raise SettingsError(
                f"{path} is of a training with {key} {theirs}, this one has {ours}: give the same options, or remove "
                "it to begin anew",
                param=key,
            )
        self.step, self.seconds, self.loss = state["step"], state["seconds"], state["loss"]
        self.total_steps = self.options.steps or state["total_steps"]
        self.model.load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])


def make_model(options: TrainOptions, ends: list[int]) -> Any:
    """A new model with random weights, from the same configuration as tiny models have."""
    values = architectures.config(options.model, ends)
    kind = values.pop("model_type")
    del values["torch_dtype"]
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **values),
        dtype=torch.float32,
        attn_implementation="eager" if options.model.kind is Kind.GPT_OSS else "sdpa",  # for attention sinks
        experts_implementation="grouped_mm",  # four times as fast on CPU as the loop over experts
    )


def rate(step: int, total_steps: int | None) -> float:
    """Share of the learning rate: rising at first, steady, falling over the last fifth once the end is known."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    if total_steps is None:
        return warm
    steady, whole = STEADY_SHARE
    falls_from = total_steps * steady // whole
    fallen = max(0.0, (step - falls_from) / max(total_steps - falls_from, 1))
    return warm * (1.0 - (1.0 - LAST_RATE) * fallen)


def _optimizer(model: torch.nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW; only matrices decay."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
