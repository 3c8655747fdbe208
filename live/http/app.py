"""The ASGI application: which paths there are, and who answers them."""

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from time import time

import msgspec
from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import Response

from live.backend import Endpoint, Json
from live.call import RefusalError
from live.deployment import ROUTER
from live.http import document, schemas
from live.http.answer import Answer
from live.http.asgi import App, Receive, Scope, Send
from live.http.errors import BROKEN, InvalidError, Refusal, decided
from live.http.gateway import Gateway
from live.http.guard import ADMIN, Guard, Keys, arrival, read_body
from live.http.reading import read
from sim.config import ConfigError

ENDPOINTS: Mapping[str, Endpoint] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
}

Handler = Callable[[Request], Awaitable[Response]]
Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


def make_app(
    gateway: Gateway,
    keys: Keys | None = None,
    admin_keys: Keys | None = None,
    lifespan: Lifespan | None = None,
) -> App:
    """The application of a gateway.

    Args:
        gateway: Who answers.
        keys: For everything but health, readiness and documentation; none: everybody may.
        admin_keys: For reloading, which is not offered without.
        lifespan: Entered before the first request is taken, left after the last answer.
    """
    keys, admin_keys = keys or Keys(), admin_keys or Keys()
    pages, keyed = Pages(gateway), bool(keys)
    completing: dict[str, App] = {}
    posts: dict[str, document.Node] = {}
    for path, endpoint in ENDPOINTS.items():
        completing[path] = Completing(gateway, endpoint)
        posts[path] = document.completing(endpoint, keyed, gateway.passes_on)
    api = document.Documented(
        posts, title="Besteffort", description=document.DESCRIPTION, redoc_url=None,
        swagger_ui_oauth2_redirect_url=None, redirect_slashes=False, lifespan=lifespan,
    )  # fmt: skip
    api.terms = lambda: gateway.terms
    told = document.page("The models that a request may name", schemas.ModelList, keyed)
    _add(api, "GET", "/v1/models", pages.models, told)
    named = {"parameters": [{"in": "path", "name": "model", "required": True,
                             "schema": {"type": "string"}}]}  # fmt: skip
    told = document.page("One of the models", schemas.Model, keyed, [404], named)
    _add(api, "GET", "/v1/models/{model:path}", pages.model, told)
    told = document.page("The gateway runs", schemas.Health, keyed=False)
    _add(api, "GET", "/health", pages.health, told)
    none: document.Responses = {503: document.answer(schemas.Readiness, "No replica is alive")}
    told = document.page("A replica is alive", schemas.Readiness, keyed=False, other=none)
    _add(api, "GET", "/ready", pages.ready, told)
    told = document.page("Metrics in the text format of Prometheus", None, keyed)
    _add(api, "GET", "/metrics", pages.metrics, told)
    if admin_keys:
        told = document.page("Read the deployment anew", schemas.Reloaded, True, [400])
        _add(api, "POST", f"{ADMIN}reload", pages.reload, told)
    api.add_exception_handler(RefusalError, _refused)
    api.add_exception_handler(HTTPException, _no_such_page)
    api.add_exception_handler(Exception, _broken)

    async def paths(scope: Scope, receive: Receive, send: Send) -> None:
        await completing.get(scope.get("path", ""), api)(scope, receive, send)

    return Guard(paths, keys, admin_keys)


class Completing:
    """Answers the requests of an endpoint: an ASGI application.

    It is no page of FastAPI's: the way of a request through that is longer than all else that
    happens to it here.
    """

    def __init__(self, gateway: Gateway, endpoint: Endpoint) -> None:
        self._gateway, self._endpoint = gateway, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the request, then answer it."""
        noted, gateway = arrival(scope), self._gateway
        try:
            if scope["method"] != "POST":
                raise RefusalError(405, "method_not_allowed", "only POST is allowed here")
            raw = await read_body(noted.headers, receive, gateway.terms.limits)
            incoming, body = await read(self._endpoint, raw, noted, gateway)
            call = gateway.dispatcher.admit(incoming)
        except RefusalError as refusal:
            headers = [(b"allow", b"POST")] if refusal.status == 405 else decided(refusal.call)
            await Refusal(refusal, headers)(scope, receive, send)
        except Exception:
            await Refusal(BROKEN)(scope, receive, send)
            raise  # to the server, which logs it
        else:
            await Answer(gateway, call, body)(scope, receive, send)


class Pages:
    """What answers on the other paths."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._created = int(time())

    async def models(self, request: Request) -> Response:
        """The virtual model that leaves the choice to the router, then the others."""
        names = (ROUTER, *self._gateway.terms.models)
        return _json({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, request: Request) -> Response:
        """One model."""
        name, names = request.path_params["model"], (ROUTER, *self._gateway.terms.models)
        if name not in names:
            allowed = f"model = {name!r}: one of {', '.join(names)}"
            raise InvalidError("model", allowed, "model_not_found", 404)
        return _json(self._model(name))

    async def health(self, request: Request) -> Response:
        """Whether the gateway runs."""
        return _json({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """Whether some replica takes requests."""
        dispatcher = self._gateway.dispatcher
        accounts = dispatcher.fleet.ledger.accounts
        replicas: Json = {
            name: {
                "alive": account.alive,
                "running": account.running,
                "waiting": len(account.entries) - account.running,
            }
            for name, account in accounts.items()
        }
        ready = not dispatcher.draining and any(account.alive for account in accounts.values())
        return _json({"ready": ready, "replicas": replicas}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """What Prometheus reads."""
        return Response(self._gateway.metrics(), headers={"content-type": CONTENT_TYPE_LATEST})

    async def reload(self, request: Request) -> Response:
        """Read the deployment anew; what is wrong with it is told, and then nothing changes."""
        try:
            await self._gateway.reload()
        except ConfigError as error:
            raise InvalidError(None, str(error), "invalid_config") from None
        return _json({"status": "reloaded"})

    def _model(self, name: str) -> Json:
        """A model as OpenAI describes it, and how much context its replicas have at most."""
        cluster = self._gateway.dispatcher.fleet.ledger.cluster
        longest = self._gateway.terms.max_context
        if name != ROUTER:
            own = cluster.max_context[cluster.replica_model == cluster.models.index(name)]
            longest = int(own.max(initial=0))
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "besteffort",
            "max_model_len": longest,
        }


def _add(api: FastAPI, method: str, path: str, handler: Handler, told: document.Node) -> None:
    api.add_api_route(path, handler, methods=[method], response_class=Response, **told)


def _json(words: Json, status: int = 200) -> Response:
    return Response(msgspec.json.encode(words), status, media_type="application/json")


async def _refused(request: Request, refusal: RefusalError) -> Refusal:
    return Refusal(refusal)


async def _no_such_page(request: Request, error: HTTPException) -> Refusal:
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    message = f"{request.method} {request.url.path}: {error.detail}"
    headers = {name.lower().encode(): text.encode() for name, text in (error.headers or {}).items()}
    return Refusal(RefusalError(error.status_code, code, message), list(headers.items()))


async def _broken(request: Request, error: Exception) -> Refusal:
    return Refusal(BROKEN)
