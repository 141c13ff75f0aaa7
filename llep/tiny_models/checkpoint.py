"""Files of a checkpoint, written to a temporary folder beside the final one and then renamed: nothing is half-made."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llep.errors import LlepError, SettingsError
from llep.tiny_models.options import Dtype
from llep.tiny_models.tensors import Floats, Tensor

WEIGHTS = "model.safetensors"
TRAINING = "training.json"  # how a trained model came to be; a random one has none
FILES = frozenset(
    {WEIGHTS, TRAINING, "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
)

BYTES = {Dtype.FLOAT32: 4, Dtype.BFLOAT16: 2}
_SAFETENSORS_DTYPE = {Dtype.FLOAT32: "F32", Dtype.BFLOAT16: "BF16"}

ReportProgress = Callable[[int, int], None]  # (bytes done, bytes in all)


@contextmanager
def new_folder(directory: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `directory` when the block ends well and is removed when it doesn't.

    Raises SettingsError if `directory` is no empty folder and `force` is off, or holds something besides a checkpoint.
    """
    directory = Path(os.path.abspath(directory))
    try:
        check_replaceable(directory, force=force)
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    except OSError as error:
        raise _unwritable(directory, error) from None
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        _replace(directory, temporary)
    except OSError as error:
        raise _unwritable(directory, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(directory: Path, *, force: bool) -> None:
    """Raises SettingsError unless `directory` is missing, empty, or with `force` a model to be replaced."""
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise SettingsError(f"{directory} is not a folder: choose another name", param="directory")
    if not directory.exists():
        return
    names = sorted(path.name for path in directory.iterdir())
    foreign = [name for name in names if name not in FILES]
    if foreign:
        rule = "llep replaces nothing but models of its own making: choose another folder"
        raise SettingsError(f"{directory} holds {foreign[0]!r}: {rule}", param="directory")
    if names and not force:
        raise SettingsError(f"{directory} already holds a model: add --force to replace it", param="directory")


def _replace(directory: Path, new: Path) -> None:
    """Put `new` in the place of `directory`, which is missing, empty or to be replaced."""
    if not directory.exists() or not any(directory.iterdir()):
        new.rename(directory)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old.", dir=directory.parent))
    directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def _unwritable(directory: Path, error: OSError) -> SettingsError:
    reason = error.strerror or str(error)
    return SettingsError(f"{directory} can't be written: {reason}; choose another folder", param="directory")


def check_room(folder: Path, needed_bytes: int) -> None:
    """Raises LlepError unless the file system of `folder` has room for the weights."""
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise LlepError(
            f"the model needs {needed_bytes / 1e9:.2f} GB and {folder.parent} has {free_bytes / 1e9:.2f} GB free: "
            "make a smaller model (fewer --layers or --experts, smaller --hidden, --intermediate or --vocab, "
            "--dtype bfloat16) or choose another disk"
        )


def total_bytes(tensors: dict[str, Tensor], dtype: Dtype) -> int:
    return sum(tensor.size for tensor in tensors.values()) * BYTES[dtype]


def write_weights(
    path: Path, tensors: dict[str, Tensor], dtype: Dtype, seed: int, progress: ReportProgress | None
) -> None:
    """One safetensors file, written tensor by tensor: no more than one is in memory, and bfloat16 needs no torch."""
    total, done = total_bytes(tensors, dtype), 0
    with path.open("wb") as file:
        _write_header(file, tensors, dtype)
        for name, tensor in tensors.items():
            array = tensor.draw(name, seed)
            data = array.astype("<f4", copy=False) if dtype is Dtype.FLOAT32 else _bfloat16(array)
            file.write(np.ascontiguousarray(data).data)
            done += data.nbytes
            if progress is not None:
                progress(done, total)


def _write_header(file: BinaryIO, tensors: dict[str, Tensor], dtype: Dtype) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.size * BYTES[dtype]
        header[name] = {"dtype": _SAFETENSORS_DTYPE[dtype], "shape": tensor.shape, "data_offsets": (start, stop)}
        start = stop
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    file.write(len(data).to_bytes(8, "little") + data)


def _bfloat16(array: Floats) -> Any:
    """The upper halves of the float32s as little-endian integers, rounded to nearest even."""
    bits = array.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (rounded >> np.uint32(16)).astype("<u2")


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
