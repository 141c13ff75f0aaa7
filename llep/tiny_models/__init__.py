"""Small random MoE checkpoints that vLLM loads without a download, with a tokenizer and, on request, hot experts.

Written with numpy and tokenizers only; torch is not imported.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llep.errors import LlepError, SettingsError
from llep.tiny_models.checkpoint import ReportProgress, check_room, new_folder, total_bytes, write_json, write_weights
from llep.tiny_models.options import Dtype, Kind, Options

__all__ = ["Dtype", "Kind", "Options", "ReportProgress", "TinyModel", "write_tiny_model"]


@dataclass(frozen=True, slots=True)
class TinyModel:
    """What was written. hot_share: share of pairs that the hot experts get by simulation; None without hot experts."""

    directory: Path
    options: Options
    parameters: int
    size_bytes: int
    hot_share: float | None
    hot_biases: list[float]  # by MoE layer


def write_tiny_model(
    kind: str,
    directory: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: ReportProgress | None = None,
    **options: Any,
) -> TinyModel:
    """Write a random checkpoint of `kind` (gpt-oss, deepseek, qwen3) to `directory`; see Options for the keywords.

    The same options give the same bytes with the same Python and numpy. `force` replaces a model written earlier.
    Raises SettingsError for options that can't be, LlepError for a lack of room or of packages.
    """
    parsed = _parse_options(kind, options)
    try:
        from llep.tiny_models import tokenizer
    except ModuleNotFoundError as error:
        raise LlepError(f"making a model needs the package {error.name}: pip install 'llep[model]'") from None
    from llep.tiny_models import architectures
    from llep.tiny_models.skew import find_skew

    with new_folder(Path(directory), force=force) as folder:
        skew = find_skew(parsed)
        trained = tokenizer.train(parsed)
        tensors = architectures.tensors(parsed, trained, skew.biases)
        check_room(folder, total_bytes(tensors, parsed.dtype))
        write_json(folder / "config.json", architectures.config(parsed, trained.ends))
        write_json(folder / "generation_config.json", {"eos_token_id": trained.ends, "do_sample": True})
        write_json(folder / "tokenizer_config.json", tokenizer.config(parsed, trained))
        (folder / "tokenizer.json").write_text(trained.json, encoding="utf-8")
        write_weights(folder / "model.safetensors", tensors, parsed.dtype, parsed.seed, progress)
        size_bytes = sum(file.stat().st_size for file in folder.iterdir())
    return TinyModel(
        directory=Path(directory),
        options=parsed,
        parameters=sum(tensor.size for tensor in tensors.values()),
        size_bytes=size_bytes,
        hot_share=skew.share if parsed.hot else None,
        hot_biases=skew.biases,
    )


def _parse_options(kind: str, options: dict[str, Any]) -> Options:
    known = Options.__dataclass_fields__
    for key in options:
        if key not in known:
            raise SettingsError(f"unknown option {key!r}; the options are {', '.join(known)}", param=key)
    if kind not in list(Kind):
        raise SettingsError(f"unknown kind of model {kind!r}; the kinds are {', '.join(Kind)}", param="kind")
    if "dtype" in options:
        if options["dtype"] not in list(Dtype):
            raise SettingsError(
                f"--dtype {options['dtype']} is not possible: it must be one of {', '.join(Dtype)}", param="dtype"
            )
        options = {**options, "dtype": Dtype(options["dtype"])}
    return Options(kind=Kind(kind), **options)
