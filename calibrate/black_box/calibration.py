"""The way from a URL to a bundle."""

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from calibrate.black_box.bundle import BlackBoxRun, Found, error_table, make_bundle
from calibrate.black_box.client import Client, Listed
from calibrate.black_box.estimate import find
from calibrate.black_box.sweep import cells, key, sweep
from calibrate.journal import Journal
from calibrate.progress import bars
from calibrate.quality_source import assigned_quality
from sim.config import ConfigError, check
from sim.profile import Bundle


def calibrate(values: object, console: Console, origin: str) -> Bundle:
    """Sweep the server, fit, and put the bundle together.

    Args:
        values: The settings.
        console: Where progress is shown.
        origin: The command that was given.

    Raises:
        ConfigError: for settings that are refused, or a server that does not do what is needed.
    """
    spec = check(BlackBoxRun, values, "")
    found = asyncio.run(_measure(spec, console))
    with console.status("fitting, and playing the cells that were held out …"):
        return make_bundle(spec, found, origin)


def show(bundle: Bundle, out: Path, console: Console) -> None:
    """Print how wrong a bundle is, as it was written to `out`."""
    console.print(error_table(bundle))


async def _measure(spec: BlackBoxRun, console: Console) -> Found:
    own = spec.black_box
    async with Client(spec.url, own) as client:
        model = _chosen(own.model, await client.models(), client.url)
        max_context = own.server.max_context or model.max_context
        if max_context is None:
            raise ConfigError(
                "black_box.server.max_context", None,
                f"{client.url} does not say (max_model_len of its models): give it",
            )  # fmt: skip
        name = re.sub(r"[^A-Za-z0-9._-]", "-", model.name.rsplit("/", 1)[-1]).lstrip("._-")
        assigned_quality(spec.quality, (name,))
        wanted = cells(own, max_context, spec.seed)
        path = Path(f"{spec.out}.run", f"{name}.jsonl")
        if not spec.resume:
            path.unlink(missing_ok=True)
        asked = key(client.url, model.name, own, spec.seed)
        with Journal(path, asked) as journal, bars(console) as begin:
            told = begin(f"{name}: {len(wanted)} cells")
            played = await sweep(client, model.name, own, wanted, journal, spec.seed, told)
    seen = find(played, own.server.max_batch, own.server.token_budget)
    return Found(name, max_context, tuple(played), seen)


def _chosen(asked: str | None, listed: Sequence[Listed], url: str) -> Listed:
    names = [each.name for each in listed]
    if asked is None and len(listed) != 1:
        raise ConfigError("black_box.model", None, f"{url} lists: {', '.join(names) or 'none'}")
    if asked is not None and asked not in names:
        raise ConfigError("black_box.model", asked, f"{url} lists: {', '.join(names) or 'none'}")
    return listed[names.index(asked) if asked is not None else 0]
