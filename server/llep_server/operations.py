"""Long jobs as resources: a bounded number is kept, also over restarts; one runs at a time."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from llep.config import SWEPT
from llep.errors import LlepError, StoreUnavailable, UnknownEngine
from llep_server.errors import TYPE_BY_STATUS, Busy, ErrorDetail, Interrupted, UnknownOperation, status_of
from llep_server.operation_store import OperationStore
from llep_server.recordings import copy_of, data_bytes
from llep_server.scheduler import Scheduler
from llep_server.schemas import Operation, TuningOrder
from llep_server.simulation import check_cost_model, check_settings
from llep_server.work import Worker

logger = logging.getLogger(__name__)

TIMEOUT_S = 3600.0
MOST_WAITING = 8
MOST_KEPT = 50


class Operations:
    """Those that wait, run, or ended lately. What is on disk is what was when each began, and when it ended."""

    def __init__(self, scheduler: Scheduler, state_dir: Path) -> None:
        self._scheduler = scheduler
        self._worker = Worker(MOST_WAITING + 1)
        self._store = OperationStore(state_dir)
        self._writer = ThreadPoolExecutor(1, "operations")  # one after the other, and the event loop never waits
        self._turn = asyncio.Lock()
        self._kept: dict[str, Operation] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._is_closing = False

    def open(self) -> None:
        """Take over from the control plane before this one; what it did not bring to an end has failed."""
        for operation in self._store.open():
            self._keep(operation)
            if operation.ended_s is None:
                self._end(operation, "failed", _interrupted())

    async def start_tuning(self, order: TuningOrder, author: str) -> Operation:
        """Raises UnknownRecording, RecordingConflict, SettingsError, Busy, StoreUnavailable."""
        check_cost_model(order.cost_model)
        check_settings(order.base, "base")
        recording = await self._scheduler.recording(order.recording)
        data_bytes(recording)
        order = order.model_copy(update={"base": await self._settings_of(recording.engine) | order.base})
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
        self._tasks[operation.id] = asyncio.create_task(self._run(operation, order))
        try:
            await asyncio.wrap_future(self._writer.submit(self._store.put, operation))
        except StoreUnavailable:
            await self._cancel(operation.id)
            self._forget(operation.id)
            raise
        return operation

    async def _settings_of(self, engine: str) -> dict[str, Any]:
        """Those that matter to a sweep; none of an engine that nobody knows any more."""
        try:
            view = await self._scheduler.settings(engine)
        except UnknownEngine:
            return {}
        return {one.key: one.value for one in view.settings if one.key in (*SWEPT, "slots_per_rank")}

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
        if id in self._tasks:
            await self._cancel(id)
        else:
            self._forget(id)
        return operation

    async def close(self) -> None:
        self._is_closing = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._worker.close()
        await asyncio.to_thread(self._writer.shutdown)
        self._store.close()

    async def _cancel(self, id: str) -> None:
        task = self._tasks[id]
        task.cancel()
        await asyncio.wait([task])

    def _keep(self, operation: Operation) -> None:
        self._kept[operation.id] = operation
        ended = [id for id in self._kept if id not in self._tasks and id != operation.id]
        for id in ended[: max(len(self._kept) - MOST_KEPT, 0)]:
            self._forget(id)

    def _forget(self, id: str) -> None:
        del self._kept[id]
        self._writer.submit(self._store.drop, id)

    async def _run(self, operation: Operation, order: TuningOrder) -> None:
        try:
            async with self._turn:
                operation.state, operation.started_s = "running", time.time()
                operation.result = await self._tuned(operation, order)
            self._end(operation, "done")
        except asyncio.CancelledError:
            if self._is_closing:
                self._end(operation, "failed", _interrupted())
            else:
                self._end(operation, "cancelled")
        except LlepError as error:
            self._end(operation, "failed", error)
        except Exception as error:
            logger.exception("operation %s", operation.id)
            self._end(operation, "failed", LlepError(f"{type(error).__name__}: the control plane's log says more"))

    async def _tuned(self, operation: Operation, order: TuningOrder) -> dict[str, Any]:
        def on_progress(ratio: float) -> None:
            operation.progress_ratio = ratio

        async with self._worker.turn(TIMEOUT_S), copy_of(self._scheduler, order.recording) as folder:
            arguments = {**order.model_dump(exclude={"recording"}), "folder": str(folder)}
            answer = await self._worker.do("tuning", json.dumps(arguments).encode(), on_progress)
        result: dict[str, Any] = json.loads(answer)
        return result

    def _end(
        self, operation: Operation, state: Literal["done", "failed", "cancelled"], error: LlepError | None = None
    ) -> None:
        self._tasks.pop(operation.id, None)
        operation.state, operation.ended_s = state, time.time()
        operation.error = _detail(error) if error else None
        if state == "done":
            operation.progress_ratio = 1.0
        self._writer.submit(self._put_end, operation)
        logger.info("operation %s of %s: %s", operation.id, operation.author, state)

    def _put_end(self, operation: Operation) -> None:
        try:
            self._store.put(operation)
        except StoreUnavailable as error:  # nobody waits for it, and it is in memory
            logger.warning("operation %s has ended, which a restart will not know: %s", operation.id, error.message)


def _interrupted() -> LlepError:
    return Interrupted("the control plane was restarted while this ran: start it again")


def _detail(error: LlepError) -> ErrorDetail:
    kind = TYPE_BY_STATUS.get(status_of(error), "invalid_request_error")
    return ErrorDetail(message=error.message, type=kind, param=error.param, code=error.code)
