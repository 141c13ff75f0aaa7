"""Long jobs as resources: a bounded number is kept, one runs at a time."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import tempfile
import time
import uuid
from pathlib import Path

from llep.errors import LlepError
from llep_server.errors import TYPE_BY_STATUS, Busy, ErrorDetail, UnknownOperation, status_of
from llep_server.recordings import data_bytes, fetch
from llep_server.scheduler import Scheduler
from llep_server.schemas import Operation, TuningOrder
from llep_server.simulation import check_cost_model, check_settings
from llep_server.work import Worker

logger = logging.getLogger(__name__)

TIMEOUT_S = 3600.0
MOST_WAITING = 8
MOST_KEPT = 50


class Operations:
    """Those that wait, run, or ended lately."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._worker = Worker(MOST_WAITING + 1)
        self._kept: dict[str, Operation] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start_tuning(self, order: TuningOrder, author: str) -> Operation:
        """Raises UnknownRecording, RecordingConflict, SettingsError, Busy."""
        check_cost_model(order.cost_model)
        check_settings(order.base, "base")
        data_bytes(await self._scheduler.recording(order.recording))
        if len(self._tasks) > MOST_WAITING:
            raise Busy(f"{len(self._tasks)} operations have not ended, no more are taken: cancel some, or wait")
        operation = Operation(
            id=uuid.uuid4().hex[:12],
            kind="tuning",
            state="waiting",
            progress_ratio=0.0,
            author=author,
            arguments=order.model_dump(),
            created_s=time.time(),
        )
        self._keep(operation)
        task = asyncio.create_task(self._run(operation, order))
        self._tasks[operation.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(operation.id, None))
        return operation

    def all(self) -> list[Operation]:
        """Newest first, without results."""
        return [kept.model_copy(update={"result": None}) for kept in reversed(self._kept.values())]

    def get(self, id: str) -> Operation:
        if id not in self._kept:
            raise UnknownOperation(f"there is no operation {id!r}: the newest {MOST_KEPT} are kept", param="id")
        return self._kept[id]

    async def delete(self, id: str) -> Operation:
        """Cancel it, or forget it if it has ended."""
        operation = self.get(id)
        task = self._tasks.get(id)
        if task is None:
            return self._kept.pop(id)
        task.cancel()
        await asyncio.wait([task])
        return operation

    async def close(self) -> None:
        for task in list(self._tasks.values()):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await self._worker.close()

    def _keep(self, operation: Operation) -> None:
        self._kept[operation.id] = operation
        ended = [id for id in self._kept if id not in self._tasks and id != operation.id]
        for id in ended[: max(len(self._kept) - MOST_KEPT, 0)]:
            del self._kept[id]

    async def _run(self, operation: Operation, order: TuningOrder) -> None:
        def on_progress(ratio: float) -> None:
            operation.progress_ratio = ratio
            if operation.state == "waiting":
                operation.state, operation.started_s = "running", time.time()

        try:
            with tempfile.TemporaryDirectory(prefix="llep-tuning-") as folder:
                await fetch(self._scheduler, order.recording, Path(folder))
                arguments = {**order.model_dump(exclude={"recording"}), "folder": folder}
                job = json.dumps(arguments).encode()
                operation.result = await self._worker.do("tuning", job, TIMEOUT_S, on_progress)
            operation.state, operation.progress_ratio = "done", 1.0
        except asyncio.CancelledError:
            operation.state = "cancelled"
            raise
        except LlepError as error:
            operation.state, operation.error = "failed", _detail(error)
        finally:
            operation.ended_s = time.time()
            logger.info("operation %s of %s: %s", operation.id, operation.author, operation.state)


def _detail(error: LlepError) -> ErrorDetail:
    kind = TYPE_BY_STATUS.get(status_of(error), "invalid_request_error")
    return ErrorDetail(message=error.message, type=kind, param=error.param, code=error.code)
