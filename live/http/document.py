"""The OpenAPI document: what each path takes and answers, headers and refusals included."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from live.backend import Endpoint
from live.deployment import ROUTER, Terms
from live.http import schemas
from live.http.reading import LEAST_MS, MOST_MS

Node = dict[str, Any]  # of the document
Responses = dict[int | str, Node]  # by status

DESCRIPTION = f"""Besteffort serves several models behind one: a request for `{ROUTER}` is answered
by the model and replica that a learned router chooses, so that as many answers as possible come in
time and as good as the load allows.

Answers of the deployment's own workers are greedy: `temperature`, `top_p`, `seed` and other
parameters of sampling are accepted and make no difference. Servers by URL get the body as it was
sent, parameters that are not listed here included.

A request whose replica fails before the first byte of its answer is tried at another, unnoticed.
If that happens later, a stream ends with an event `{{"error": ...}}` and without `[DONE]`."""

_REFUSALS: Mapping[int, str] = {
    400: "The request cannot be answered as it is: `invalid_json`, `invalid_value`, "
    "`missing_value`, `unsupported_parameter`, `context_length_exceeded`.",
    401: "No or a wrong API key: `invalid_api_key`.",
    404: "There is no such model: `model_not_found`.",
    408: "The body did not arrive in time: `request_timeout`.",
    413: "The body is too large: `request_too_large`.",
    415: "The body is no JSON by its content type: `unsupported_media_type`.",
    429: "Too much load: `queue_full`, `too_late`, `shed`, `too_many_requests`.",
    500: "A fault of the gateway: `internal_error`.",
    502: "Replicas failed: `backend_lost`.",
    503: "No replica is alive, or the gateway is about to end: `no_capacity`, `draining`.",
    504: "The deadline passed: `deadline_exceeded`.",
}
_DECIDED: Mapping[str, tuple[str, Node]] = {
    "model": ("The model that answers.", {"type": "string"}),
    "replica": ("The replica that answers.", {"type": "string"}),
    "reason": (
        "Who chose it: the `policy`, the client (`pinned`), or the rule that stood in for a "
        "policy that failed.",
        {
            "type": "string",
            "enum": ["policy", "pinned", "fallback_error", "fallback_late", "fallback_masked"],
        },
    ),
    "policy": ("The policy or rule that chose it, and its version.", {"type": "string"}),
    "slack-ms": ("Time left for the last token when it was chosen.", {"type": "number"}),
    "attempts": ("Replicas that were tried.", {"type": "integer", "minimum": 0}),
}
_HEADERS: Mapping[str, str] = {
    "x-slo-e2e-ms": "Milliseconds from the request to its last token, as a bound.",
    "x-slo-ttft-ms": "Milliseconds from the request to its first token, as a bound.",
    "x-task": "The kind of request, by which models differ in quality.",
    "x-request-id": "The client's own name for the request.",
}
_REQUEST_ID: Node = {
    "x-request-id": {
        "description": "The request's id: the client's, as far as it may stand in a header.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,128}$"},
    }
}
_RETRY_AFTER: Node = {
    "retry-after": {
        "description": "Seconds after which to try again.",
        "schema": {"type": "integer", "minimum": 1},
    }
}
_CHALLENGE: Node = {
    "www-authenticate": {"required": True, "schema": {"type": "string", "const": "Bearer"}}
}
_STREAM: Node = {
    "itemSchema": {  # of OpenAPI 3.2
        "type": "object",
        "required": ["data"],
        "properties": {
            "data": {
                "type": "string",
                "description": "A piece of the answer as JSON, in OpenAI's form. With "
                "`include_usage` the last has no choices but `usage`. At the very end: `[DONE]`.",
            }
        },
    },
}
_SECURITY: Node = {"security": [{"key": []}]}
_SCHEMAS = "#/components/schemas/"
_ERROR: type[BaseModel] = schemas.ErrorBody
_BODIES: Mapping[Endpoint, type[BaseModel]] = {
    "chat": schemas.ChatBody,
    "completions": schemas.CompletionBody,
}
_WHOLES: Mapping[Endpoint, type[BaseModel]] = {
    "chat": schemas.ChatCompletion,
    "completions": schemas.Completion,
}


class Documented(FastAPI):  # type: ignore[misc]
    """FastAPI with what it cannot know: paths that are not its own, keys, and the terms."""

    terms: Callable[[], Terms]

    def __init__(self, posts: Mapping[str, Node], **of_fastapi: object) -> None:
        """`posts` are operations by their paths."""
        super().__init__(**of_fastapi)
        self._posts = posts

    def openapi(self) -> Node:
        """The document, with the models and tasks of now."""
        document: Node = super().openapi()
        terms, components = self.terms(), document.setdefault("components", {})
        _, defined = models_json_schema(
            [(model, "validation") for model in (*_BODIES.values(), *_WHOLES.values(), _ERROR)],
            ref_template=_SCHEMAS + "{model}",
        )
        for body in _BODIES.values():
            model = defined["$defs"][body.__name__]["properties"]["model"]
            model["enum"] = [ROUTER, *terms.models]
        components.setdefault("schemas", {}).update(defined["$defs"])
        components["parameters"] = _parameters(terms)
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["paths"] |= {path: {"post": operation} for path, operation in self._posts.items()}
        return document


def completing(endpoint: Endpoint, keyed: bool, passes_on: bool) -> Node:
    """The operation that completes."""
    statuses = [400, *_locked(keyed), 404, 408, 413, 415, 429, 500, 502, 503, 504]
    told = decided_headers()
    responses = _refusals(statuses, told)
    responses[200] = {
        "model": _WHOLES[endpoint],
        "description": "The answer, as a whole or as a stream.",
        "headers": {**_REQUEST_ID, **told},
        "content": {"text/event-stream": _STREAM},
    }
    if passes_on:
        responses["default"] = _refusal("What a server by URL refuses with.", told)
    body = {"application/json": {"schema": _reference(_BODIES[endpoint])}}
    return {
        "operationId": endpoint,
        "summary": "Answer a conversation" if endpoint == "chat" else "Continue a text",
        "parameters": [{"$ref": f"#/components/parameters/{name}"} for name in _HEADERS],
        "requestBody": {"required": True, "content": body},
        "responses": {str(status): _resolved(told) for status, told in responses.items()},
        **(_SECURITY if keyed else {}),
    }


def page(
    summary: str,
    model: type[BaseModel] | None,
    keyed: bool,
    refusals: Iterable[int] = (),
    extra: Node | None = None,
    other: Responses | None = None,
) -> Node:
    """What FastAPI is told of a page; without a model it is a text."""
    responses = _refusals([*_locked(keyed), *refusals, 500], {})
    responses[200] = {"description": summary, "headers": _REQUEST_ID}
    if model is None:
        responses[200]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    else:
        responses[200]["model"] = model
    return _operation(summary, {**responses, **(other or {})}, keyed, extra or {})


def answer(model: type[BaseModel], description: str) -> Node:
    """A response that is no refusal."""
    return {"model": model, "description": description, "headers": _REQUEST_ID}


def decided_headers() -> Node:
    """The headers that come with a decision."""
    return {
        f"x-besteffort-{name}": {"description": description, "schema": schema}
        for name, (description, schema) in _DECIDED.items()
    }


def _operation(summary: str, responses: Responses, keyed: bool, extra: Node) -> Node:
    return {
        "summary": summary,
        "responses": responses,
        "openapi_extra": {**extra, **(_SECURITY if keyed else {})},
    }


def _resolved(response: Node) -> Node:
    """A response as the document has it, where FastAPI takes a model."""
    model = response.pop("model")
    content = {"application/json": {"schema": _reference(model)}, **response.get("content", {})}
    return {**response, "content": content}


def _reference(model: type[BaseModel]) -> Node:
    return {"$ref": _SCHEMAS + model.__name__}


def _locked(keyed: bool) -> list[int]:
    return [401] if keyed else []


def _refusals(statuses: Iterable[int], told: Node) -> Responses:
    responses: Responses = {}
    for status in statuses:
        own: Node = {}
        if status in (429, 503):
            own = _RETRY_AFTER
        elif status == 401:
            own = _CHALLENGE
        after = told if status in (400, 429, 502, 503, 504) else {}
        responses[status] = _refusal(_REFUSALS[status], {**own, **after})
    return responses


def _refusal(description: str, headers: Node) -> Node:
    return {
        "model": _ERROR,
        "description": description,
        "headers": {**_REQUEST_ID, **headers},
    }


def _parameters(terms: Terms) -> Node:
    """The headers of a request that are looked at, by their names."""
    bound: Node = {"type": "number", "minimum": LEAST_MS, "maximum": MOST_MS}
    schemata: Node = {
        "x-slo-e2e-ms": bound,
        "x-slo-ttft-ms": bound,
        "x-task": {"type": "string", "enum": [*terms.tasks], "default": terms.default_task},
        "x-request-id": {"type": "string"},
    }
    return {
        name: {"in": "header", "name": name, "description": said, "schema": schemata[name]}
        for name, said in _HEADERS.items()
    }
