"""From a client's words to an `Incoming`, or to what is wrong with them."""

import asyncio
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar, cast

import msgspec
from pydantic import JsonValue, ValidationError

from live.backend import Endpoint, Json
from live.call import Incoming
from live.deployment import ROUTER
from live.http.errors import InvalidError
from live.http.gateway import Gateway
from live.http.guard import Arrival
from live.http.schemas import Body, ChatBody, CompletionBody, Message
from sim.utility import BoundSpec

LEAST_MS, MOST_MS = 0.001, 86_400_000  # of a bound in a header: a microsecond to a day

B = TypeVar("B", bound=Body)

# What our own workers do not know, and the values that ask for nothing.
FOR_SERVERS: Mapping[str, tuple[JsonValue, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "modalities": (None, ["text"]),
    "n": (None, 1),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "web_search_options": (None,),
}

_LONG = 16_384  # characters: longer texts are encoded in a thread
_SHOWN = 80  # characters of a value in a message
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


async def read(
    endpoint: Endpoint, raw: bytes, arrival: Arrival, gateway: Gateway
) -> tuple[Incoming, Body]:
    """The request that a client sends, and its body.

    Raises:
        RefusalError: if it cannot be answered, whatever the load.
    """
    terms, headers = gateway.terms, arrival.headers
    kind: type[ChatBody] | type[CompletionBody] = ChatBody if endpoint == "chat" else CompletionBody
    if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
        raise InvalidError(
            "content-type", "must be application/json", "unsupported_media_type", 415
        )
    words = _json(raw)
    body = _checked(kind, words)
    if body.model != ROUTER and body.model not in terms.models:
        named = ", ".join((ROUTER, *terms.models))
        raise InvalidError(
            "model", f"model = {body.model!r}: one of {named}", "model_not_found", 404
        )
    task = headers.get(b"x-task", terms.default_task.encode()).decode("latin-1")
    if task not in terms.deadlines:
        raise InvalidError("x-task", f"x-task = {task!r}: one of {', '.join(terms.tasks)}",
                           "unknown_task")  # fmt: skip
    if not gateway.passes_on:
        _refuse_for_servers(words)
    if isinstance(body, ChatBody):
        prompt, prompt_tokens = await _conversation(body, words, gateway)
    else:
        assert isinstance(body, CompletionBody)
        prompt, prompt_tokens = await _prompt(body, words, gateway)
    max_tokens = _max_tokens(body, prompt_tokens, gateway)
    own, routed = terms.deadlines[task], body.model == ROUTER
    # who names a model gets what it would get there: no deadline but its own
    e2e, ttft, tpot_s = (own.e2e, own.ttft, own.tpot_s) if routed else (None, None, None)
    e2e_s, ttft_s = (_bound_s(headers, name) for name in (b"x-slo-e2e-ms", b"x-slo-ttft-ms"))
    stop = body.stop or ()
    incoming = Incoming(
        request_id=arrival.request_id,
        endpoint=endpoint,
        body=words,
        task=task,
        prompt=prompt,
        prompt_tokens=prompt_tokens,
        max_tokens=max_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        ignore_eos=bool(body.ignore_eos),
        forced_tokens=_forced_tokens(body, max_tokens, terms.forced_lengths),
        model=None if routed else body.model,
        e2e_s=_default_s(e2e, max_tokens) if e2e_s is None else e2e_s,
        ttft_s=_default_s(ttft, max_tokens) if ttft_s is None else ttft_s,
        tpot_s=tpot_s,
        arrived_s=arrival.at_s,
    )
    return incoming, body


def _json(raw: bytes) -> Json:
    try:
        words = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InvalidError(None, f"the body is no JSON: {error}", "invalid_json") from None
    if not isinstance(words, dict):
        raise InvalidError(None, "the body must be a JSON object", "invalid_json")
    return words


def _checked(kind: type[B], words: Json) -> B:
    try:
        return kind.model_validate(words)
    except ValidationError as refused:
        raise _explained(refused, words) from None


def _explained(refused: ValidationError, words: Json) -> InvalidError:
    """The first field that is wrong, what it is, and what may stand there instead."""
    errors = refused.errors(include_url=False)
    param = str(errors[0]["loc"][0])
    if errors[0]["type"] == "missing" and len(errors[0]["loc"]) == 1:
        return InvalidError(param, f"{param} is missing", "missing_value")
    own = [error for error in errors if error["loc"][0] == param]
    allowed = dict.fromkeys(_requirement(error["loc"][1:], error["msg"]) for error in own)
    return InvalidError(param, f"{param} = {_shown(words[param])}: {' or '.join(allowed)}")


def _requirement(within: Sequence[int | str], message: str) -> str:
    """What must hold of a part of a field; tags of unions are no parts."""
    parts = [str(part) for part in within if isinstance(part, int) or part.isidentifier()]
    parts = [part for part in parts if part != "str"]
    said = message.removeprefix("Value error, ")
    return f"{'.'.join(parts)}: {said}" if parts else said


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _refuse_for_servers(words: Json) -> None:
    """Refuse what only servers by URL can do."""
    for name in FOR_SERVERS.keys() & words.keys():
        value = words[name]
        if not any(type(value) is type(none) and value == none for none in FOR_SERVERS[name]):
            raise InvalidError(
                name, f"{name} = {_shown(value)}: not supported by this deployment's workers",
                "unsupported_parameter",
            )  # fmt: skip


async def _conversation(
    body: ChatBody, words: Json, gateway: Gateway
) -> tuple[tuple[int, ...] | None, int]:
    """The token ids of a conversation, if they can be had, and about how many there are."""
    messages, plain = list[dict[str, str]](), not words.get("tools")
    for message in body.messages:
        text = _text(message)
        plain = plain and text is not None
        messages.append({"role": message.role, "content": text or ""})
    if not plain and not gateway.passes_on:
        raise InvalidError(
            "messages", "messages: parts of another type than text are not supported by this "
            "deployment's workers", "unsupported_parameter",
        )  # fmt: skip
    tokenizer = gateway.tokenizer
    if tokenizer is None or not plain:
        return None, gateway.estimate("chat", words)
    characters = sum(len(message["content"]) for message in messages)
    try:
        ids = await _encoded(partial(tokenizer.encode_chat, messages), characters)
    except ValueError as error:
        raise InvalidError("messages", str(error)) from None
    if not ids:
        raise InvalidError("messages", "messages: must have a token")
    return ids, len(ids)


def _text(message: Message) -> str | None:
    """What a message says; None if it holds more than text."""
    if isinstance(message.content, str):
        return message.content
    parts = message.content or []
    if any(part.type != "text" or part.text is None for part in parts):
        return None
    return "".join(part.text or "" for part in parts)


async def _prompt(
    body: CompletionBody, words: Json, gateway: Gateway
) -> tuple[tuple[int, ...] | None, int]:
    """The token ids of a prompt, if they can be had, and about how many there are."""
    prompt = body.prompt
    if isinstance(prompt, list) and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if not isinstance(prompt, str):
        ids = cast(tuple[int, ...], tuple(prompt))
    elif gateway.tokenizer is None:
        return None, gateway.estimate("completions", words)
    else:
        ids = await _encoded(partial(gateway.tokenizer.encode, prompt), len(prompt))
        if not ids:
            raise InvalidError("prompt", f"prompt = {prompt!r}: must have a token")
    return ids, len(ids)


async def _encoded(encode: Callable[[], Sequence[int]], characters: int) -> tuple[int, ...]:
    """Token ids; of a long text in a thread, so that others need not wait."""
    return tuple(await asyncio.to_thread(encode) if characters > _LONG else encode())


def _max_tokens(body: Body, prompt_tokens: int, gateway: Gateway) -> int:
    """How many tokens are answered at most.

    Raises:
        InvalidError: if no replica has room for so many.
    """
    terms, asked = gateway.terms, body.max_tokens
    newer = body.max_completion_tokens if isinstance(body, ChatBody) else None
    if asked is not None and newer is not None and asked != newer:
        raise InvalidError(
            "max_completion_tokens",
            f"max_completion_tokens = {newer}, max_tokens = {asked}: only one may be given",
        )
    asked = newer if asked is None else asked
    room = terms.max_context - prompt_tokens
    if room < (asked or 1):
        raise InvalidError(
            "max_tokens" if room >= 1 else "messages" if isinstance(body, ChatBody) else "prompt",
            f"prompt of {prompt_tokens} and max_tokens {asked or 1}: together at most "
            f"{terms.max_context}", "context_length_exceeded",
        )  # fmt: skip
    return min(terms.limits.max_tokens, room) if asked is None else asked


def _forced_tokens(body: Body, max_tokens: int, allowed: bool) -> int | None:
    """How many tokens are answered exactly, where that is asked for."""
    forced = body.forced_output_tokens
    if forced is None:
        return None
    name = "forced_output_tokens"
    if not allowed:
        raise InvalidError(
            name, f"{name} = {forced}: not allowed by this deployment", "unsupported_parameter"
        )
    if forced > max_tokens:
        raise InvalidError(name, f"{name} = {forced}: at most max_tokens, which is {max_tokens}")
    return forced


def _bound_s(headers: Mapping[bytes, bytes], name: bytes) -> float | None:
    """The bound that a header gives, in seconds."""
    if name not in headers:
        return None
    text, key = headers[name].decode("latin-1"), name.decode()
    value_ms = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not LEAST_MS <= value_ms <= MOST_MS:
        allowed = f"a number of at least {LEAST_MS}, at most {MOST_MS}"
        raise InvalidError(key, f"{key} = {_shown(text)}: {allowed}")
    return value_ms / 1000


def _default_s(bound: BoundSpec | None, max_tokens: int) -> float | None:
    """The deployment's bound, in seconds."""
    return None if bound is None else bound.base_s + bound.per_token_s * max_tokens
