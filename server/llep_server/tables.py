"""Load matrices as files that other tools read."""

from __future__ import annotations

import asyncio
import csv
import io
from typing import Any, Literal

from fastapi import Response

from llep.views import LoadMatrix
from llep_server.errors import MissingPackage

Format = Literal["json", "csv", "parquet"]
MEDIA_TYPES: dict[str, str] = {
    "json": "application/json",
    "csv": "text/csv; charset=utf-8",
    "parquet": "application/vnd.apache.parquet",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {"text/csv": {}, "application/vnd.apache.parquet": {"schema": {"type": "string"}}},
        "description": "layers x N, as asked for by `format`",
    }
}


async def respond(matrix: LoadMatrix, format: Format) -> Response:
    """The matrix in the format; as a file to save where it is one."""
    if format == "json":
        return Response(matrix.model_dump_json(), media_type=MEDIA_TYPES["json"])
    content = await asyncio.to_thread(to_csv if format == "csv" else to_parquet, matrix)
    name = f"llep-{matrix.by}-{matrix.stage}.{format}"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type=MEDIA_TYPES[format], headers=headers)


def to_csv(matrix: LoadMatrix) -> bytes:
    """Columns layer, rank or expert, tokens."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("layer", matrix.by, "tokens"))
    for layer, row in zip(matrix.layers, matrix.values, strict=True):
        writer.writerows((layer, column, tokens) for column, tokens in enumerate(row))
    return text.getvalue().encode()


def to_parquet(matrix: LoadMatrix) -> bytes:
    """The same columns. Raises MissingPackage."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError:
        raise MissingPackage(
            "parquet needs pyarrow where the control plane runs: pip install 'llep[planning]'"
        ) from None
    columns = len(matrix.values[0]) if matrix.values else 0
    table = pa.table(
        {
            "layer": pa.array([layer for layer in matrix.layers for _ in range(columns)], pa.int32()),
            matrix.by: pa.array(list(range(columns)) * len(matrix.layers), pa.int32()),
            "tokens": pa.array([tokens for row in matrix.values for tokens in row], pa.int64()),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
