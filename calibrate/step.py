"""A step of an engine: what it computed for whom, how long its parts took, and its counts."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """What a step computes for one request: `tokens` after the `done` that are in the cache."""

    request_id: str
    done: int
    tokens: int
    decode: bool  # else a chunk of a prompt


@dataclass(frozen=True)
class Formed:
    """A step before it is computed."""

    pieces: tuple[Piece, ...]
    reset: tuple[str, ...]  # requests that lost their cache to it, and wait again
    begin_s: float
    prepared_s: float

    @property
    def admitted(self) -> list[str]:
        """Requests that it takes off the queue, those among them that had been reset before."""
        return [p.request_id for p in self.pieces if p.done == 0 and not p.decode]


@dataclass(frozen=True)
class Step:
    """One step; the times are seconds of the host's monotonic clock (`time.perf_counter`)."""

    pieces: tuple[Piece, ...]
    emitted: tuple[tuple[str, int], ...]  # (request, token)
    finished: tuple[str, ...]
    begin_s: float
    prepared_s: float  # the step is formed, its inputs are on the device
    computed_s: float  # the device is done, tokens are back on the host
    end_s: float  # requests are brought up to date
    device_s: float | None  # of the computation, by CUDA events; None on a CPU


@dataclass(frozen=True)
class Counts:
    """The counts of rule 12 of `docs/simulation.md`, of one step."""

    sequences: int
    decodes: int
    prompt_tokens: int
    tokens: int
    pairs: int
    kv_tokens: int
    done_tokens: int


def counts(pieces: Sequence[Piece]) -> Counts:
    """The counts of a step that computed `pieces`."""
    chunks = [(piece.done, piece.tokens) for piece in pieces if not piece.decode]
    prompt_tokens = sum(tokens for _, tokens in chunks)
    decodes = len(pieces) - len(chunks)
    return Counts(
        sequences=len(pieces),
        decodes=decodes,
        prompt_tokens=prompt_tokens,
        tokens=decodes + prompt_tokens,
        pairs=sum(tokens * done + tokens * (tokens + 1) // 2 for done, tokens in chunks),
        kv_tokens=sum(piece.done + 1 for piece in pieces if piece.decode),
        done_tokens=sum(done for done, _ in chunks),
    )
