"""The ASGI application of a server: routes, and what stands around them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from parafuse.errors import nearest
from parafuse.launch.serve.card import ModelCard
from parafuse.launch.serve.http import errors, openapi
from parafuse.launch.serve.http.access import Access, Door, Keys
from parafuse.launch.serve.http.health import Health
from parafuse.launch.serve.http.images import Images
from parafuse.launch.serve.http.jobs_api import Jobs
from parafuse.launch.serve.http.limits import BODY_S, Limits
from parafuse.launch.serve.http.page import Page
from parafuse.launch.serve.http.queue_api import Queue
from parafuse.launch.serve.http.remote_vae import RemoteVae
from parafuse.launch.serve.http.service import Admit, Service
from parafuse.launch.serve.http.videos import Videos
from parafuse.launch.serve.jobs import JobStore
from parafuse.launch.serve.settings import Serving
from parafuse.launch.serve.supervisor_client import SupervisorClient


def make_app(
    settings: Serving,
    card: ModelCard,
    *,
    store: JobStore,
    keys: Keys,
    supervisor: SupervisorClient,
    admit: Admit,
    body_s: float = BODY_S,
    beside: AbstractAsyncContextManager[None] | None = None,
) -> FastAPI:
    """The application; its `state.service` is what the routes share. `body_s`: how long a body may take to come.
    `beside`: what runs for as long as the application does."""
    service = Service(settings, card, store, keys=keys, supervisor=supervisor, admit=admit)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with beside or nullcontext(), supervisor:
            yield

    app = FastAPI(
        title="parafuse",
        version="1",
        description=f"Pictures and videos of {card.name}.",
        lifespan=lifespan,
        docs_url=None,  # it would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.service = service
    for part in (Images(service), Videos(service), Jobs(service), Queue(service)):
        app.include_router(part.router(), dependencies=[Depends(_known_query)])
    app.include_router(RemoteVae(service).router())  # it reads its queries itself
    app.include_router(Page().router())
    app.include_router(Health(service).router())  # probes may say what they like
    errors.install(app)
    app.add_exception_handler(RequestValidationError, _wrong_parameter)
    app.openapi = lambda: openapi.describe(app)
    # the last is the outermost
    app.add_middleware(Door, keys=keys)
    app.add_middleware(Limits, max_bytes=int(settings.max_body_megabytes * 1e6), body_s=body_s)
    app.add_middleware(Access, metrics=service.metrics)
    return app


async def _known_query(request: Request) -> None:
    """Raises ApiError (400) for a query's name that the route does not have."""
    route = request.scope.get("route")
    known = [one.alias for one in route.dependant.query_params] if isinstance(route, APIRoute) else []
    for name in request.query_params:
        if name not in known:
            hint = nearest(name, known) or f"; there are {', '.join(known) or 'none'}."
            raise errors.invalid(name[:80], f"there is no such query parameter{hint}", "unknown_parameter")


async def _wrong_parameter(request: Request, error: Exception) -> JSONResponse:
    """A query's value that is none."""
    first: dict[str, Any] = error.errors()[0] if isinstance(error, RequestValidationError) else {}
    name = str(first.get("loc", ("?",))[-1])[:80]
    return await errors.answer(request, errors.invalid(name, f"{first.get('msg', 'is wrong')}."))
