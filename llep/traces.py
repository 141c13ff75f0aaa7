"""Recordings of counts: a folder of Parquet parts, written and read in a stream with bounded memory.

A recording of one engine is a folder with part-000000.parquet, part-000001.parquet, ... A part is written under
another name and renamed when it is whole, because a Parquet file without its footer can't be read: whoever writes may
be killed at any time and loses at most the part in hand. Every part says by itself what it is of (the key `llep` of its
metadata: JSON with format, version, the model's shape, num_ranks), so there is no index that could disagree.

Columns of a part, sorted by (step, layer, rank, expert), rows without tokens left out:

    model   string   the model's name
    layer   int32    the model's number of the MoE layer
    step    int64    number of the step, growing over all parts
    phase   string   prefill or decode
    rank    int32    the rank whose tokens were routed
    expert  int32    logical expert, 0..num_experts-1
    tokens  int64    token-expert pairs, > 0

Optional transitions-000000.parquet, ... hold which expert tokens went on to: model, layer, step (the last one counted
in), expert, next_expert (of the next MoE layer), tokens. Their rows add up over files.

Shape letters: L MoE layers in order of layer_numbers, R ranks, E experts.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from llep.errors import LlepError
from llep.shapes import PHASES, ModelShape, StepCounts

FORMAT, VERSION = "llep.trace", 1
METADATA_KEY = b"llep"
UNFINISHED = ".unfinished"
TAR_MEMBER = re.compile(r"(part|transitions)-\d{6}\.parquet", re.ASCII)

_NAME = pa.dictionary(pa.int32(), pa.string())
PART_COLUMNS = {
    "model": _NAME,
    "layer": pa.int32(),
    "step": pa.int64(),
    "phase": _NAME,
    "rank": pa.int32(),
    "expert": pa.int32(),
    "tokens": pa.int64(),
}
TRANSITION_COLUMNS = {
    "model": _NAME,
    "layer": pa.int32(),
    "step": pa.int64(),
    "expert": pa.int32(),
    "next_expert": pa.int32(),
    "tokens": pa.int64(),
}
_STEP_AT = list(PART_COLUMNS).index("step")
ROW_GROUP_ROWS = 1 << 19
READ_ROWS = 1 << 19


class TraceError(LlepError, ValueError):
    """A recording can't be read or written."""

    code = "invalid_trace"


@dataclass(frozen=True, slots=True)
class BrokenPart:
    """A file of a recording that can't be read, and why."""

    path: Path
    reason: str


class TraceWriter:
    """Writes a recording step by step. Use as a context manager: leaving it makes the last part whole.

    A part is closed after part_rows rows or part_s seconds, so that this is the most a crash can lose. After max_bytes
    on disk (None: no limit; passed by at most one row group) `append` writes nothing and returns False.
    """

    def __init__(
        self,
        folder: Path,
        shape: ModelShape,
        num_ranks: int,
        *,
        part_rows: int = 16_000_000,
        part_s: float = 30.0,
        max_bytes: int | None = None,
        beside: Collection[str] = (),
    ) -> None:
        """beside: names of files that may be in the folder already."""
        if num_ranks < 1:
            raise TraceError(f"num_ranks must be at least 1, got {num_ranks}")
        folder.mkdir(parents=True, exist_ok=True)
        if any(path.name not in beside for path in folder.iterdir()):
            raise TraceError(f"{folder} is not empty: give a recording a folder of its own")
        self.folder, self.shape, self.num_ranks = folder, shape, num_ranks
        self.bytes_written = 0
        self._part_rows, self._part_s, self._max_bytes = part_rows, part_s, max_bytes
        self._metadata = _metadata_of(shape, num_ranks)
        self._part: _Part | None = None
        self._parts = self._transitions = 0
        self._last_step = -1

    def append(self, step: StepCounts) -> bool:
        """Add one step; whether it was written. Raises TraceError for counts that do not fit or a step out of order."""
        self._check(step)
        if self._max_bytes is not None and self._bytes_on_disk() >= self._max_bytes:
            return False
        if self._part is None:
            path = self.folder / f"part-{self._parts:06d}.parquet"
            self._part = _Part(path, pa.schema(list(PART_COLUMNS.items()), metadata=self._metadata))
        self._part.append(self._rows(step))
        self._last_step = step.step
        if self._part.rows >= self._part_rows or self._part.age_s >= self._part_s:
            self.finish_part()
        return True

    def append_transitions(self, step: int, tokens_LEE: npt.NDArray[np.int64]) -> None:
        """Add tokens_LEE[layer, expert, next_expert] [layers - 1, E, E]: those since the call before, up to `step`."""
        expected = (self.shape.num_layers - 1, self.shape.num_experts, self.shape.num_experts)
        if tokens_LEE.shape != expected:
            raise TraceError(f"transitions must have shape {expected}, got {tokens_LEE.shape}")
        if tokens_LEE.size and tokens_LEE.min() < 0:
            raise TraceError(f"transitions must be >= 0, got {tokens_LEE.min()}")
        layer, expert, next_expert = np.nonzero(tokens_LEE)
        columns = {
            "layer": np.array(self.shape.layer_numbers)[layer],
            "step": np.full(len(layer), step),
            "expert": expert,
            "next_expert": next_expert,
            "tokens": tokens_LEE[layer, expert, next_expert],
        }
        schema = pa.schema(list(TRANSITION_COLUMNS.items()), metadata=self._metadata)
        part = _Part(self.folder / f"transitions-{self._transitions:06d}.parquet", schema)
        part.append(_table(schema, columns, {"model": self.shape.name}))
        self.bytes_written += part.finish()
        self._transitions += 1

    def finish_part(self) -> None:
        """Make what has been appended so far whole on disk."""
        if self._part is not None:
            self.bytes_written += self._part.finish()
            self._part = None
            self._parts += 1

    def _bytes_on_disk(self) -> int:
        return self.bytes_written + (self._part.bytes if self._part is not None else 0)

    def _check(self, step: StepCounts) -> None:
        expected = (self.shape.num_layers, self.num_ranks, self.shape.num_experts)
        if step.counts_LRE.shape != expected:
            raise TraceError(f"counts of step {step.step} must have shape {expected}, got {step.counts_LRE.shape}")
        if step.counts_LRE.dtype.kind not in "iu" or step.counts_LRE.min() < 0:
            raise TraceError(f"counts of step {step.step} must be integers >= 0")
        if step.step <= self._last_step:
            raise TraceError(f"step {step.step} follows step {self._last_step}: steps must grow")
        if step.phase not in PHASES:
            raise TraceError(f"phase must be one of {', '.join(PHASES)}, got {step.phase!r}")

    def _rows(self, step: StepCounts) -> Any:
        counts = np.ascontiguousarray(step.counts_LRE).reshape(-1)
        at = np.flatnonzero(counts)
        layer_rank, expert = np.divmod(at, self.shape.num_experts)
        layer, rank = np.divmod(layer_rank, self.num_ranks)
        columns = {
            "layer": np.array(self.shape.layer_numbers)[layer],
            "step": np.full(len(at), step.step),
            "rank": rank,
            "expert": expert,
            "tokens": counts[at],
        }
        schema = pa.schema(list(PART_COLUMNS.items()))
        return _table(schema, columns, {"model": self.shape.name, "phase": step.phase})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish_part()


class _Part:
    """One Parquet file in the making, in row groups of whole steps."""

    def __init__(self, path: Path, schema: Any) -> None:
        self._path, self._schema = path, schema
        self._unfinished = path.with_name(path.name + UNFINISHED)
        self._file = self._unfinished.open("wb")
        self._writer = pq.ParquetWriter(
            self._file,
            schema,
            compression="zstd",
            compression_level=1,
            use_dictionary=[name for name in schema.names if name != "tokens"],
            write_page_checksum=True,
        )
        self._waiting: list[Any] = []
        self._waiting_rows = 0
        self._started_s = time.monotonic()
        self.rows = 0

    @property
    def age_s(self) -> float:
        return time.monotonic() - self._started_s

    @property
    def bytes(self) -> int:
        return self._file.tell()

    def append(self, table: Any) -> None:
        self._waiting.append(table)
        self._waiting_rows += table.num_rows
        self.rows += table.num_rows
        if self._waiting_rows >= ROW_GROUP_ROWS:
            self._flush()

    def finish(self) -> int:
        """Close, make durable, rename; the file's bytes."""
        self._flush()
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        size = self._file.tell()
        self._file.close()
        self._unfinished.replace(self._path)
        return size

    def _flush(self) -> None:
        if self._waiting_rows:
            table = pa.concat_tables(self._waiting).cast(self._schema)
            self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
        self._waiting, self._waiting_rows = [], 0


class Trace:
    """A recording on disk: a folder of parts, or one part. Raises TraceError if nothing of it can be read."""

    def __init__(self, path: Path, *, skip_broken: bool = False) -> None:
        """Broken parts are listed in `broken`; reading stops at them with an error unless skip_broken."""
        self.path, self.skip_broken = path, skip_broken
        self.broken: list[BrokenPart] = []
        self.unfinished = sorted(path.glob("*" + UNFINISHED)) if path.is_dir() else []
        self.parts, metadata = self._open(_part_paths(path, self.unfinished), PART_COLUMNS)
        self.transition_parts, _ = self._open(
            sorted(path.glob("transitions-*.parquet")) if path.is_dir() else [], TRANSITION_COLUMNS, metadata
        )
        if metadata is None:
            raise TraceError("; ".join(f"{part.path} {part.reason}" for part in self.broken))
        self.shape, self.num_ranks = _shape_of(metadata)
        self._layer_at = np.full(max(self.shape.layer_numbers) + 1, -1, dtype=np.int32)
        self._layer_at[list(self.shape.layer_numbers)] = np.arange(self.shape.num_layers)

    def num_rows(self) -> int:
        """Rows in whole parts, from their footers."""
        return sum(pq.read_metadata(path).num_rows for path in self.parts)

    def num_steps(self) -> int | None:
        """Steps from the first to the last, those without tokens included; None where the footers do not say."""
        groups = [pq.read_metadata(path).row_group(at) for path in self.parts for at in range(_row_groups(path))]
        if not groups:
            return 0
        first, last = (group.column(_STEP_AT).statistics for group in (groups[0], groups[-1]))
        return int(last.max - first.min + 1) if first is not None and last is not None else None

    def steps(self) -> Iterator[StepCounts]:
        """The steps in order, [layers, ranks, experts] each, one in memory at a time; those without tokens left out.

        With skip_broken, a part that turns out to be damaged gives the steps before the damage.
        """
        last_step = -1
        for path in self._readable(self.parts):
            try:
                for step in self._part_steps(path):
                    if step.step <= last_step:
                        raise TraceError(f"{path}: step {step.step} follows step {last_step}: steps must grow")
                    last_step = step.step
                    yield step
            except TraceError as error:
                if not self.skip_broken:
                    raise
                self.broken.append(BrokenPart(path, error.message.removeprefix(f"{path} ")))

    def transitions(self) -> npt.NDArray[np.int64] | None:
        """tokens[layer, expert, next_expert] [layers - 1, E, E] over the whole recording; None if not recorded."""
        if not self.transition_parts and not any(p.path.name.startswith("transitions") for p in self.broken):
            return None
        experts = self.shape.num_experts
        tokens_LEE = np.zeros((self.shape.num_layers - 1, experts, experts), dtype=np.int64)
        for path in self._readable(self.transition_parts):
            for columns in self._batches(path, ["layer", "expert", "next_expert", "tokens"]):
                layer = self._layers(path, columns["layer"])
                _check_ids(path, "expert", columns["expert"], experts)
                _check_ids(path, "next_expert", columns["next_expert"], experts)
                _check_ids(path, "layer", layer, len(tokens_LEE))
                np.add.at(tokens_LEE, (layer, columns["expert"], columns["next_expert"]), columns["tokens"])
        return tokens_LEE

    def _open(
        self, paths: Iterable[Path], columns: dict[str, Any], metadata: dict[str, Any] | None = None
    ) -> tuple[list[Path], dict[str, Any] | None]:
        """Those paths that are whole parts of one recording; the others go to `broken`."""
        whole = []
        for path in paths:
            try:
                found = _read_metadata(path, columns)
            except TraceError as error:
                self.broken.append(BrokenPart(path, error.message))
                continue
            if metadata is not None and found != metadata:
                self.broken.append(BrokenPart(path, "is of another recording: its model or number of ranks differs"))
                continue
            metadata = found
            whole.append(path)
        return whole, metadata

    def _readable(self, paths: list[Path]) -> Iterator[Path]:
        """Paths in order; an error where a broken part of the same kind comes in between."""
        kind = "transitions" if paths is self.transition_parts else ""
        broken = [part for part in self.broken if part.path.name.startswith("transitions") == bool(kind)]
        if broken and not self.skip_broken:
            path, reason = broken[0].path, broken[0].reason
            raise TraceError(
                f"{path} {reason}; {len(paths)} other parts are whole: skip the broken ones to use them "
                "(--skip-broken, or skip_broken=True)"
            )
        yield from paths

    def _part_steps(self, path: Path) -> Iterator[StepCounts]:
        reader = _StepReader(path, self.shape, self.num_ranks)
        for columns in self._batches(path, ["layer", "step", "phase", "rank", "expert", "tokens"]):
            columns["layer"] = self._layers(path, columns["layer"])
            yield from reader.read(columns)
        yield from reader.rest()

    def _batches(self, path: Path, names: list[str]) -> Iterator[dict[str, npt.NDArray[Any]]]:
        try:
            with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
                for batch in file.iter_batches(READ_ROWS, columns=names, use_threads=False):
                    columns = {name: _to_numpy(path, name, batch.column(name)) for name in names}
                    if len(columns["tokens"]) and columns["tokens"].min() < 0:
                        raise TraceError(f"{path}: tokens must be >= 0, got {columns['tokens'].min()}")
                    yield columns
        except (pa.ArrowException, OSError) as error:
            raise TraceError(f"{path} is damaged: {_first_line(error)}") from None

    def _layers(self, path: Path, numbers: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
        """Positions of layer numbers."""
        _check_ids(path, "layer", numbers, len(self._layer_at))
        places: npt.NDArray[np.int32] = self._layer_at[numbers]
        if len(places) and places.min() < 0:
            raise TraceError(f"{path}: layer {numbers[places.argmin()]} is not one of the model's MoE layers")
        return places


class _StepReader:
    """Puts the rows of one part, batch by batch, together to steps."""

    def __init__(self, path: Path, shape: ModelShape, num_ranks: int) -> None:
        self._path = path
        self._dimensions = (shape.num_layers, num_ranks, shape.num_experts)
        self._step, self._phase, self._last_cell = -1, "", -1
        self._counts = np.zeros(0, dtype=np.int64)

    def read(self, columns: dict[str, npt.NDArray[Any]]) -> Iterator[StepCounts]:
        _check_ids(self._path, "rank", columns["rank"], self._dimensions[1])
        _check_ids(self._path, "expert", columns["expert"], self._dimensions[2])
        cells = columns["layer"].astype(np.int64)
        for name, count in (("rank", self._dimensions[1]), ("expert", self._dimensions[2])):
            cells *= count
            cells += columns[name]
        step = columns["step"]
        if len(step) and step.min() < 0:
            raise TraceError(f"{self._path}: step must be >= 0, got {step.min()}")
        bounds = [0, *(np.flatnonzero(np.diff(step)) + 1).tolist(), len(step)] if len(step) else []
        for start, stop in zip(bounds, bounds[1:], strict=False):
            if step[start] != self._step:
                yield from self.rest()
                self._start(int(step[start]), PHASES[columns["phase"][start]])
            self._fill(cells[start:stop], columns["tokens"][start:stop])

    def rest(self) -> Iterator[StepCounts]:
        """The step in hand, if any."""
        if self._step >= 0:
            yield StepCounts(self._step, self._phase, self._counts.reshape(self._dimensions))

    def _start(self, step: int, phase: str) -> None:
        if step <= self._step:
            raise TraceError(f"{self._path}: step {step} follows step {self._step}: steps must grow")
        self._step, self._phase, self._last_cell = step, phase, -1
        self._counts = np.zeros(int(np.prod(self._dimensions)), dtype=np.int64)

    def _fill(self, cells: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64]) -> None:
        if cells[0] <= self._last_cell or (np.diff(cells) <= 0).any():
            raise TraceError(
                f"{self._path}: rows of step {self._step} must be sorted by layer, rank and expert, once each"
            )
        self._counts[cells] = tokens
        self._last_cell = int(cells[-1])


def _row_groups(path: Path) -> int:
    return int(pq.read_metadata(path).num_row_groups)


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """The recording at `path` as a folder or part; a .tar of parts is unpacked for as long as the block lasts."""
    if path.suffix != ".tar" or not path.is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="llep-recording-") as folder:
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    name = Path(member.name).name
                    if member.isfile() and TAR_MEMBER.fullmatch(name) and (source := tar.extractfile(member)):
                        with source, (Path(folder) / name).open("wb") as target:
                            shutil.copyfileobj(source, target, 1 << 20)
        except (tarfile.TarError, OSError) as error:
            raise TraceError(f"{path} is no recording as `llep record export` writes it: {error}") from None
        yield Path(folder)


def write_trace(folder: Path, shape: ModelShape, num_ranks: int, steps: Iterable[StepCounts], **limits: Any) -> None:
    """Write all steps as a recording; `limits` are TraceWriter's."""
    with TraceWriter(folder, shape, num_ranks, **limits) as writer:
        for step in steps:
            writer.append(step)


def _part_paths(path: Path, unfinished: list[Path]) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        raise TraceError(f"{path} does not exist: give the folder of a recording, or one of its parts")
    parts = sorted(path.glob("part-*.parquet"))
    if not parts and unfinished:
        raise TraceError(f"{path} holds no whole part: the recording was stopped hard before its first part was whole")
    if not parts:
        raise TraceError(f"{path} is not a recording: it holds no part-*.parquet")
    return parts


def _metadata_of(shape: ModelShape, num_ranks: int) -> dict[bytes, bytes]:
    values = {"format": FORMAT, "version": VERSION, "num_ranks": num_ranks, "shape": asdict(shape)}
    return {METADATA_KEY: json.dumps(values).encode()}


def _read_metadata(path: Path, columns: dict[str, Any]) -> dict[str, Any]:
    """What a part says of itself. Raises TraceError that reads on from its path."""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise TraceError(f"can't be read, truncated or not Parquet: {_first_line(error)}") from None
    text = (schema.metadata or {}).get(METADATA_KEY)
    missing = [name for name in columns if name not in schema.names]
    if text is None or missing:
        lack = f"the columns {', '.join(missing)}" if missing else "the key 'llep' in its metadata"
        raise TraceError(f"is Parquet, but not a recording: it lacks {lack}")
    try:
        values = json.loads(text)
        _shape_of(values)
        is_known = values["format"] == FORMAT
    except (ValueError, TypeError, KeyError, AttributeError):
        raise TraceError("has metadata under the key 'llep' that is not a recording's") from None
    if not is_known or values["version"] != VERSION:
        raise TraceError(
            f"is {values['format']} version {values['version']}, this llep reads {FORMAT} version {VERSION}: "
            "install the llep that wrote it"
        )
    return dict(values)


def _shape_of(metadata: dict[str, Any]) -> tuple[ModelShape, int]:
    shape = dict(metadata["shape"])
    return ModelShape(**{**shape, "layer_numbers": tuple(shape["layer_numbers"])}), int(metadata["num_ranks"])


def _table(schema: Any, columns: dict[str, npt.NDArray[Any]], names: dict[str, str]) -> Any:
    """A table in the schema's order; `names` are columns with one value throughout."""
    rows = len(columns["step"])
    zeros = pa.array(np.zeros(rows, dtype=np.int32))
    arrays = [
        pa.DictionaryArray.from_arrays(zeros, [names[field.name]])
        if field.name in names
        else pa.array(columns[field.name].astype(np.int64, copy=False)).cast(field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _to_numpy(path: Path, name: str, column: Any) -> npt.NDArray[Any]:
    """The column's integers as they are; for phases, their places in PHASES."""
    if column.null_count:
        raise TraceError(f"{path}: column {name} holds {column.null_count} empty cells")
    is_name = pa.types.is_dictionary(column.type) or pa.types.is_string(column.type)
    if is_name != (name == "phase") or not (is_name or pa.types.is_integer(column.type)):
        raise TraceError(f"{path}: column {name} must hold {PART_COLUMNS.get(name, 'integers')}, got {column.type}")
    if is_name:
        column = column.dictionary_encode() if pa.types.is_string(column.type) else column
        places = [_phase_place(path, phase) for phase in column.dictionary.to_pylist()]
        rows: npt.NDArray[Any] = np.array(places, dtype=np.int8)[column.indices.to_numpy(zero_copy_only=False)]
        return rows
    integers: npt.NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return integers


def _phase_place(path: Path, phase: str) -> int:
    if phase not in PHASES:
        raise TraceError(f"{path}: phase must be one of {', '.join(PHASES)}, got {phase!r}")
    return PHASES.index(phase)


def _check_ids(path: Path, name: str, ids: npt.NDArray[Any], count: int) -> None:
    if len(ids) and not 0 <= ids.min() <= ids.max() < count:
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise TraceError(f"{path}: {name} must be in 0..{count - 1}, got {wrong}")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
