"""The control plane as an ASGI application."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext

from fastapi import Depends, FastAPI

from llep import __version__
from llep.scheduler.client import SchedulerClient
from llep_server import errors, page, routes
from llep_server.config import ServerConfig
from llep_server.depends import bearer
from llep_server.keys import KeyRing
from llep_server.metrics import Exposition
from llep_server.middleware import BoundedBody, Gate, RequestContext
from llep_server.operations import Operations
from llep_server.recordings import Downloads, sweep_copies
from llep_server.scheduler import Caller, Scheduler
from llep_server.simulation import Simulator
from llep_server.stream import Broadcast
from llep_server.through_ray import sending
from llep_server.tracing import from_env


def create_app(config: ServerConfig, caller: Caller | None = None) -> FastAPI:
    """The application. `caller` stands in for the connection to the scheduler that it would otherwise keep.

    Raises UnsupportedConfiguration if the keys file or Ray's address is not as it should be.
    """
    keys = KeyRing(config.keys_file) if config.keys_file else None
    client = None if caller else SchedulerClient(config.ray_address, config.ray_namespace, config.state_dir)
    carrier = caller or client
    assert carrier is not None
    scheduler = Scheduler(carrier)
    tracing = from_env(os.environ)
    broadcast, simulator, exposition = Broadcast(scheduler), Simulator(scheduler), Exposition(scheduler)
    operations = Operations(scheduler, config.state_dir)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with client or nullcontext(), AsyncExitStack() as parts:  # closes all, whatever one of them raises
            if config.ray_metrics:
                await parts.enter_async_context(sending(exposition, carrier))
            for part in (operations, simulator, broadcast):
                parts.push_async_callback(part.close)
            if tracing:
                parts.push_async_callback(asyncio.to_thread, tracing.close)
                parts.callback(asyncio.create_task(tracing.follow(scheduler)).cancel)
            operations.open()
            await asyncio.to_thread(sweep_copies)
            yield

    app = FastAPI(
        title="llep control plane",
        version=__version__,
        description="See and steer Least-Loaded Expert Parallelism.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.keys = keys
    app.state.scheduler = scheduler
    app.state.exposition = exposition
    app.state.broadcast = broadcast
    app.state.docs_pages = {}
    app.state.simulator = simulator
    app.state.operations = operations
    app.state.downloads = Downloads(scheduler)
    guarded = [Depends(bearer)] if keys else []
    app.include_router(page.router)
    app.include_router(routes.ops.router)
    app.include_router(routes.ops.scrape, dependencies=guarded)
    app.include_router(routes.v1, dependencies=guarded)
    errors.install(app)
    # The last one added sees the request first.
    app.add_middleware(BoundedBody)
    app.add_middleware(Gate, config=config, keys=keys)
    app.add_middleware(RequestContext, tracing=tracing)
    return app
