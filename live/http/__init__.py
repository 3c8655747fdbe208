"""OpenAI's protocol over HTTP: requests in, answers out, and nothing decided here.

A request passes the `guard` (who may, and how much), is read into an `Incoming` (`reading`),
given to the dispatcher, and its `Answer` is sent as a stream or as a whole. `make_app` builds the
ASGI application; `make_server` serves it, with the timers that uvicorn does not have (`server`).
"""

from live.http.app import make_app
from live.http.gateway import Gateway, Merge, Tokenizer
from live.http.guard import Keys, read_keys
from live.http.server import make_server

__all__ = [
    "Gateway",
    "Keys",
    "Merge",
    "Tokenizer",
    "make_app",
    "make_server",
    "read_keys",
]
