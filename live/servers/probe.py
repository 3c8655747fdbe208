"""Asks a server what it has, and whether it is well."""

import asyncio
from collections.abc import Callable

import aiohttp
from pydantic import JsonValue
from pydantic_core import from_json

from live.servers.exchange import LOST, lost
from live.servers.spec import ServerSpec
from sim.config import ConfigError

MODELS = "/v1/models"
HEALTH = "/health"
PAGE_BYTES = 4 * 2**20  # of a page that are read
NEEDED = {
    401: "needs a key: api_key_env names the environment variable that holds it",
    403: "refuses the key",
    404: "has no such page: url is the server's, without /v1/…",
}


class Prober:
    """The health of a server, and the name by which it has the model."""

    def __init__(
        self, session: aiohttp.ClientSession, spec: ServerSpec, own: Callable[[str], str]
    ) -> None:
        """`own` makes a server's words fit to show."""
        self._session, self._spec, self._own = session, spec, own
        self._page = HEALTH
        self.served = ""  # the model's name at the server; empty before it was found

    async def find(self) -> str | None:
        """Look for the model; None if it is there, else why the server cannot be asked.

        Raises:
            ConfigError: if the server does not have it, refuses the key or lists no models.
        """
        try:
            status, page = await self._get(MODELS)
        except (*LOST, TimeoutError) as error:
            return lost(error)
        if status in NEEDED:
            raise ConfigError(self._key("url"), self._spec.url + MODELS, NEEDED[status])
        if status != 200:
            return f"answered {status}: {page.decode('utf-8', 'replace')}"
        names = _listed(page)
        if names is None:
            raise ConfigError(
                self._key("url"), self._spec.url + MODELS,
                "must list its models as OpenAI's servers do, said "
                f"{self._own(page.decode('utf-8', 'replace'))!r}",
            )  # fmt: skip
        wanted = self._spec.served_model
        if (wanted is None and len(names) != 1) or (wanted is not None and wanted not in names):
            what = ", ".join(names) or "no model"
            raise ConfigError(
                self._key("served_model"), wanted, f"must be one that the server has: {what}"
            )
        self.served = wanted or names[0]
        return None

    async def fault(self) -> str | None:
        """What is wrong with the server; None if it is well and has the model."""
        try:
            status, _ = await self._get(self._page)
            if status == 404 and self._page == HEALTH:
                self._page = MODELS
                status, _ = await self._get(self._page)
            return f"answered {status}" if status != 200 else await self.find()
        except (*LOST, TimeoutError) as error:
            return lost(error)
        except ConfigError as error:
            return str(error)

    async def _get(self, path: str) -> tuple[int, bytes]:
        async with (
            asyncio.timeout(self._spec.breaker.answer_s),
            self._session.get(self._spec.url + path, allow_redirects=False) as response,
        ):
            page = bytearray()
            async for piece in response.content.iter_any():
                page += piece
                if len(page) > PAGE_BYTES:
                    break
            return response.status, bytes(page)

    def _key(self, setting: str) -> str:
        return f"{self._spec.name}.{setting}"


def _listed(page: bytes) -> list[str] | None:
    """The names in a list of models; None if it is none."""
    try:
        listing: JsonValue = from_json(page)
    except ValueError:
        return None
    entries = listing.get("data") if isinstance(listing, dict) else None
    if not isinstance(entries, list):
        return None
    names = [entry.get("id") for entry in entries if isinstance(entry, dict)]
    return [name for name in names if isinstance(name, str)]
