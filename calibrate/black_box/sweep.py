"""The sweep: some number of clients, each sending its next request when the last one is answered.

A cell is a number of clients, a prompt length and an answer length. Lengths of its requests are
drawn around the cell's own: with equal ones all clients would go in lockstep, and no prompt would
ever be computed beside decoding requests.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from itertools import product

import numpy as np
from pydantic import TypeAdapter

from calibrate.black_box.client import Answer, Client, Reply
from calibrate.black_box.spec import SPREAD, BlackBoxSpec
from calibrate.journal import Journal
from sim.config import ConfigError

FIRST_TOKEN_ID = 4  # below are the special tokens of most vocabularies
AT_ONCE = 4  # tokens of an answer that no server emits in one step
WORDS = (  # each of them a token of its own in most vocabularies
    "the", "of", "and", "to", "in", "is", "was", "for", "that", "on", "with", "as", "at", "by",
    "from", "it", "an", "be", "this", "are", "or", "had", "not", "but", "have", "they", "which",
    "one", "you", "were", "all", "her",
)  # fmt: skip


@dataclass(frozen=True, order=True)
class Cell:
    """What is sent: so many clients, with requests of about this length."""

    concurrency: int
    prompt_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        return f"{self.concurrency} x {self.prompt_tokens} x {self.output_tokens}"


@dataclass(frozen=True)
class Played:
    """A cell and its answers, in the order in which they were asked for."""

    cell: Cell
    answers: tuple[Answer, ...]


ROW = TypeAdapter(Played)  # of the journal


def cells(spec: BlackBoxSpec, max_context: int, seed: int) -> list[Cell]:
    """The cells of the sweep, shuffled: a drift of the server spreads over all of them.

    Those whose requests the server cannot hold are left out.

    Raises:
        ConfigError: if none is left, or none with one client or none with several.
    """
    wanted = [
        Cell(*each) for each in product(spec.concurrency, spec.prompt_tokens, spec.output_tokens)
    ]
    capacity = spec.server.kv_tokens
    kept = [cell for cell in dict.fromkeys(wanted) if _fits(cell, max_context, capacity)]
    if len({cell.concurrency for cell in kept}) < 2 or all(c.concurrency > 1 for c in kept):
        room = "" if capacity is None else f" and a KV cache of {capacity}"
        raise ConfigError(
            "black_box.prompt_tokens", list(spec.prompt_tokens),
            f"requests half as long again must fit a context of {max_context} tokens{room}, "
            "those of one client and of several",
        )  # fmt: skip
    return [kept[i] for i in np.random.default_rng(seed).permutation(len(kept))]


def lengths(cell: Cell, requests: int, seed: int) -> list[tuple[int, int]]:
    """Prompt and output tokens of a cell's requests."""
    rng = np.random.default_rng((seed, *astuple(cell)))
    count = max(requests, 2 * cell.concurrency)
    prompts, outputs = (
        rng.integers(round((1 - SPREAD) * middle), _most(middle) + 1, count).clip(least)
        for middle, least in ((cell.prompt_tokens, 1), (cell.output_tokens, 2))
    )
    return list(zip(prompts.tolist(), outputs.tolist(), strict=True))


async def sweep(
    client: Client, model: str, spec: BlackBoxSpec, wanted: Sequence[Cell], journal: Journal,
    seed: int, progress: Callable[[float], None],
) -> list[Played]:  # fmt: skip
    """Play the cells that the journal does not have yet; all of them, in the order of `wanted`.

    Raises:
        ConfigError: if the server fails, or does not answer as it was asked to.
    """
    played = {each.cell: each for each in map(ROW.validate_python, journal.rows)}
    left = [cell for cell in wanted if cell not in played]
    if left and spec.warm_up:
        biggest = max(left)
        await play(
            client, model, spec, biggest, lengths(biggest, 0, seed)[: spec.warm_up], seed + 1
        )
    for number, cell in enumerate(left):
        progress((len(wanted) - len(left) + number) / len(wanted))
        of_cell = lengths(cell, spec.requests, seed)
        played[cell] = await play(client, model, spec, cell, of_cell, seed)
        journal.append(ROW.dump_python(played[cell], mode="json"))
    progress(1.0)
    return [played[cell] for cell in wanted]


async def play(
    client: Client, model: str, spec: BlackBoxSpec, cell: Cell,
    of_requests: Sequence[tuple[int, int]], seed: int,
) -> Played:  # fmt: skip
    """One cell: each client takes the next request when its last one is answered."""
    rng = np.random.default_rng((seed, *astuple(cell)))
    bodies = [client.body(model, _prompt(spec, p, rng), o) for p, o in of_requests]
    replies: dict[int, Reply] = {}
    numbers = iter(range(len(bodies)))

    async def one() -> None:
        for number in numbers:
            replies[number] = await client.complete(bodies[number])

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(cell.concurrency):
                group.create_task(one())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    answers = [client.read(replies[i], output) for i, (_, output) in enumerate(of_requests)]
    several = [a for a in answers if len(a.token_s) >= AT_ONCE]
    at_once = sum(len(set(answer.token_s)) == 1 for answer in several)
    if several and at_once > len(several) / 2:
        raise ConfigError(
            "url", client.url, f"must stream token by token: {at_once} of {len(several)} answers "
            "came in one piece",
        )  # fmt: skip
    begin = answers[0].sent_s
    return Played(cell, tuple(_since(answer, begin) for answer in answers))


def key(url: str, model: str, spec: BlackBoxSpec, seed: int) -> str:
    """What the rows of one journal have in common."""
    asked = {"url": url, "model": model, "seed": seed, **spec.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _most(middle: int) -> int:
    return round((1 + SPREAD) * middle)


def _fits(cell: Cell, max_context: int, capacity: int | None) -> bool:
    longest = _most(cell.prompt_tokens) + _most(cell.output_tokens)
    return longest <= max_context and (capacity is None or cell.concurrency * longest <= capacity)


def _prompt(spec: BlackBoxSpec, tokens: int, rng: np.random.Generator) -> list[int] | str:
    if spec.prompts == "token_ids":
        return [int(i) for i in rng.integers(FIRST_TOKEN_ID, spec.vocabulary, tokens)]
    return " ".join(WORDS[i] for i in rng.integers(len(WORDS), size=tokens))


def _since(answer: Answer, begin: float) -> Answer:
    """Times after the begin of the cell, to 100 ns."""
    times = tuple(round(at - begin, 7) for at in answer.token_s)
    return Answer(answer.prompt_tokens, round(answer.sent_s - begin, 7), times)
