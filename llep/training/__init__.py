"""A small MoE trained on this machine's text in minutes, without a GPU: its routing is skewed as real models' is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llep.errors import LlepError, SettingsError
from llep.tiny_models.checkpoint import TRAINING, check_replaceable, new_folder, write_json
from llep.training.options import TrainOptions, parse_options

__all__ = ["TrainOptions", "TrainedModel", "parse_options", "state_path", "train_model"]

UNFINISHED = ".unfinished"
SAVE_EVERY_S = 60.0
BPE_PIECES = 300  # of each domain: what the tokenizer's merges are learnt from


@dataclass(frozen=True, slots=True)
class TrainedModel:
    """What was written, and training.json as plain values."""

    directory: Path
    parameters: int
    report: dict[str, Any]


class Stopped(LlepError):
    """Training was asked to stop before its end."""

    code = "training_stopped"


def state_path(directory: Path) -> Path:
    """Where an unfinished training of `directory` is kept."""
    directory = Path(os.path.abspath(directory))
    return directory.with_name(directory.name + UNFINISHED)


def train_model(
    directory: Path,
    options: TrainOptions,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda text: None,
    on_step: Callable[[Any], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainedModel:
    """Train, or go on with a training that was stopped, and write what vLLM and transformers load to `directory`.

    on_step gets each step's trainer.Progress; should_stop is asked after each step, and if it says so the state is
    saved and Stopped raised. Raises SettingsError for what can't be, LlepError for missing packages.
    """
    check_replaceable(directory, force=force)
    try:
        from tokenizers import Tokenizer
        from transformers.utils.logging import disable_progress_bar

        from llep.tiny_models import tokenizer as tiny
        from llep.training import data, report, text
        from llep.training.trainer import Trainer
    except ModuleNotFoundError as error:
        raise LlepError(f"training needs the package {error.name}: pip install 'llep[train]'") from None

    disable_progress_bar()
    model = options.model
    domains = text.find_domains(options.text, model.seed)
    say("reading " + ", ".join(f"{domain.name} {_characters(domain.trained):,} characters" for domain in domains))
    trained = tiny.train(model, (piece for domain in domains for piece in domain.trained[:BPE_PIECES]))
    tokenizer = Tokenizer.from_str(trained.json)
    encoded = [data.encode(domain, tokenizer, trained.end, options.sequence + 1) for domain in domains]
    trainer = Trainer(options, encoded, trained.ends, text.digest(domains))
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    state = state_path(directory)
    if state.exists():
        trainer.load(state)
        say(f"going on from {state}, step {trainer.step}")
    say(f"training {model.kind.value} with {parameters / 1e6:.1f} million parameters, {model.experts} experts")
    _run(trainer, state, on_step, should_stop)
    reports = report.judge(trainer.model, trainer.routing, encoded, tokenizer, options.sequence, model.seed)
    found = {
        **options.identity(),
        "parameters": parameters,
        "steps": trainer.step,
        "training_tokens": trainer.step * options.batch * options.sequence,
        "seconds": round(trainer.seconds, 1),
        "loss": round(trainer.loss, 4),
        "text_digest": text.digest(domains),
        "domains": [each.as_dict() for each in reports],
    }
    with new_folder(directory, force=force) as folder:
        trainer.model.save_pretrained(folder)
        _write_texts(folder, options, trained, found)
    state.unlink(missing_ok=True)
    return TrainedModel(directory, parameters, found)


def _run(trainer: Any, state: Path, on_step: Callable[[Any], None], should_stop: Callable[[], bool]) -> None:
    """To the end, or until asked to stop; saved now and then."""
    saved_s = time.monotonic()
    while not trainer.is_done:
        on_step(trainer.advance())
        if should_stop() and not trainer.is_done:
            _save(trainer, state)
            raise Stopped(f"stopped at step {trainer.step}, kept in {state}: the same command goes on from there")
        if time.monotonic() - saved_s >= SAVE_EVERY_S:
            _save(trainer, state)
            saved_s = time.monotonic()


def _save(trainer: Any, state: Path) -> None:
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        trainer.save(state)
    except (OSError, RuntimeError) as error:  # torch says RuntimeError for a full disk
        reason = str(error).splitlines()[0]
        raise SettingsError(f"{state} can't be written: {reason}; choose another folder", param="directory") from None


def _write_texts(folder: Path, options: TrainOptions, trained: Any, found: dict[str, Any]) -> None:
    """All that is no weight; config.json as tiny models have it, which vLLM is tested with."""
    from llep.tiny_models import architectures, tokenizer

    write_json(folder / "config.json", architectures.config(options.model, trained.ends))
    write_json(folder / "generation_config.json", {"eos_token_id": trained.ends, "do_sample": True})
    write_json(folder / "tokenizer_config.json", tokenizer.config(options.model, trained))
    (folder / "tokenizer.json").write_text(trained.json, encoding="utf-8")
    write_json(folder / TRAINING, found)


def _characters(pieces: tuple[str, ...]) -> int:
    return sum(map(len, pieces))
