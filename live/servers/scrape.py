"""What a server's own metrics say of its load, looked at from time to time."""

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from live.servers.exchange import LOST, lost

log = logging.getLogger(__name__)

RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
KV_USAGE = "vllm:kv_cache_usage_perc"
NAMES = (RUNNING, WAITING, KV_USAGE)
PAGE_BYTES = 16 * 2**20  # of a page that are read


@dataclass(frozen=True, slots=True)
class Scraped:
    """The load of one model at a server, whoever sent it; None: it does not say."""

    running: int | None  # requests
    waiting: int | None
    kv_usage: float | None  # share of the KV cache, 0 to 1; the mean of several engines


class Scraper:
    """Looks at a server's metrics; what goes wrong is told once, until it goes well again."""

    def __init__(
        self, session: aiohttp.ClientSession, url: str, replica: str, model: Callable[[], str],
        period_s: float, answer_s: float, tell: Callable[[str, Scraped], None],
    ) -> None:  # fmt: skip
        """`model` gives the model's name at the server, `answer_s` is what a look may take."""
        self._session, self._url, self._replica, self._model = session, url, replica, model
        self._period_s, self._answer_s, self._tell = period_s, answer_s, tell
        self._told = ""

    async def run(self) -> None:
        """Look once in each period, for ever."""
        while True:
            await self._look()
            await asyncio.sleep(self._period_s)

    async def _look(self) -> None:
        try:
            scraped = parse(await self._page(), self._model())
        except (*LOST, TimeoutError) as error:
            self._complain(lost(error))
            return
        except ValueError as error:
            self._complain(str(error))
            return
        missing = [
            name
            for name, value in zip(
                NAMES, (scraped.running, scraped.waiting, scraped.kv_usage), strict=True
            )
            if value is None
        ]
        self._complain(f"lack {', '.join(missing)}" if missing else "")
        if len(missing) < len(NAMES):
            self._tell(self._replica, scraped)

    async def _page(self) -> str:
        async with (
            asyncio.timeout(self._answer_s),
            self._session.get(f"{self._url}/metrics", allow_redirects=False) as response,
        ):
            page = bytearray()
            async for piece in response.content.iter_any():
                page += piece
                if len(page) > PAGE_BYTES:
                    raise ValueError(f"have more than {PAGE_BYTES} bytes")
            if response.status != 200:
                raise ValueError(f"answered {response.status}")
            return page.decode("utf-8", "replace")

    def _complain(self, what: str) -> None:
        if what and what != self._told:
            log.warning("metrics of %s: %s", self._replica, what)
        self._told = what


def parse(page: str, model: str) -> Scraped:
    """What a page of metrics in Prometheus' text format says of a model.

    Raises:
        ValueError: for a page that is none.
    """
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    lines = [line for line in page.splitlines() if line.startswith(NAMES)]  # of thousands
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        for sample in family.samples:
            named = sample.labels.get("model_name", model)
            if sample.name in found and named == model and math.isfinite(sample.value):
                found[sample.name].append(sample.value)

    def total(name: str) -> int | None:
        return round(sum(found[name])) if found[name] else None

    usage = found[KV_USAGE]
    return Scraped(total(RUNNING), total(WAITING), sum(usage) / len(usage) if usage else None)
