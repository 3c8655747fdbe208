"""`python -m tests.live.pass_through URL`: passes requests on to a server, and does nothing else.

The same HTTP libraries as a gateway's, with nothing between them: what a gateway adds beyond this
is its own. Prints its port.
"""

import socket
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import uvicorn

Message = dict[str, Any]


class PassThrough:
    """An ASGI application."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def __call__(
        self, scope: Message, receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:  # fmt: skip
        if scope["type"] == "lifespan":
            await receive()
            self.session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await self.session.close()
            await send({"type": "lifespan.shutdown.complete"})
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        headers = {"content-type": "application/json"}
        async with self.session.post(self.url + scope["path"], data=body, headers=headers) as found:
            told = [(b"content-type", found.headers["content-type"].encode())]
            start = {"type": "http.response.start", "status": found.status, "headers": told}
            await send(start)
            async for piece in found.content.iter_any():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def main() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        print(listening.getsockname()[1], flush=True)
        config = uvicorn.Config(PassThrough(sys.argv[1]), loop="uvloop", log_level="error")
        uvicorn.Server(config).run([listening])


if __name__ == "__main__":
    main()
