"""One request inside the gateway, from its arrival to the end of its answer."""

import asyncio
from dataclasses import dataclass
from time import perf_counter

from live.backend import Delta, Endpoint, Json, Reason
from live.decider import Decision
from sim.observation import Observation
from sim.router import Asked
from sim.ticks import NEVER, TICKS_PER_S


@dataclass(frozen=True, slots=True)
class Incoming:
    """A request as the protocol has read it; what its bounds and its prompt are is settled."""

    request_id: str  # the client's, or made up
    endpoint: Endpoint
    body: Json
    task: str
    prompt: tuple[int, ...] | None  # token ids, where there is a tokenizer
    prompt_tokens: int  # estimated, where there is none
    max_tokens: int
    stop: tuple[str, ...]
    ignore_eos: bool
    forced_tokens: int | None  # exactly so many; no router sees it
    model: str | None  # pinned by the client; None: the router's choice
    e2e_s: float | None  # bounds, from the arrival
    ttft_s: float | None
    tpot_s: float | None
    arrived_s: float  # on the clock of `time.perf_counter`


@dataclass(frozen=True, slots=True)
class End:
    """An answer came to its end."""

    reason: Reason


class Prediction:
    """When an answer is predicted to come; reckoned when it is first asked for.

    Nobody asks before the end of the answer, and by then no request waits for it.
    """

    def __init__(self, observation: Observation, choice: int) -> None:
        """What was observed when the request was sent to replica `choice`."""
        self._observation, self._choice = observation, choice
        _ = observation.expected_output_tokens  # rests on counts that go on

    @property
    def ttft_s(self) -> float:
        """From the decision to the first token."""
        return int(self._observation.predicted_ttft_ticks[self._choice]) / TICKS_PER_S

    @property
    def finish_s(self) -> float:
        """From the decision to the last token of an answer of the expected length."""
        return int(self._observation.predicted_finish_ticks[self._choice]) / TICKS_PER_S

    def finish_of_s(self, tokens: int) -> float:
        """The same of an answer of so many tokens."""
        round_s = int(self._observation.predicted_round_ticks[self._choice]) / TICKS_PER_S
        return self.ttft_s + max(tokens - 1, 0) * round_s


class RefusalError(Exception):
    """A request that gets no answer, and why: for a program by `code`, for people by `message`.

    `call` is the request, where it got that far.
    """

    def __init__(
        self, status: int, code: str, message: str, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.retry_after_s = retry_after_s
        self.call: Call | None = None


def broken() -> RefusalError:
    """What a request ends as by a fault of the gateway itself."""
    return RefusalError(500, "internal_error", "a fault of the gateway")


class Call:
    """A request with its decision, and what of its answer has not been fetched yet.

    `committed` is set by whoever sends the answer on, before its first byte: from then on the
    request is not tried again elsewhere.
    """

    def __init__(self, incoming: Incoming, asked: Asked) -> None:
        self.incoming, self.asked = incoming, asked
        self.decision: Decision | None = None
        self.replica = ""
        self.slack_s: float | None = None  # to its bound on the last token, at the decision
        self.predicted: Prediction | None = None  # at the decision
        self.attempts = 0
        self.tried: set[str] = set()  # replicas that failed it
        self.committed = False
        self.sent_s = self.first_token_s = self.ended_s = 0.0
        self.tokens = 0  # emitted
        self.prompt_tokens = incoming.prompt_tokens  # as the server says, if it does
        self.end: End | RefusalError | None = None
        self._deltas: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None

    async def fetch(self) -> list[Delta]:
        """What has come since the last time, at least one piece; [] at the end.

        Raises:
            RefusalError: if the request failed.
        """
        while not self._deltas and self.end is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        deltas, self._deltas = self._deltas, []
        if not deltas and isinstance(self.end, RefusalError):
            raise self.end
        return deltas

    def deliver(self, delta: Delta) -> None:
        """Put a piece of the answer in."""
        if self.tokens == 0 and delta.tokens:
            self.first_token_s = perf_counter()
        self.tokens += delta.tokens
        self._deltas.append(delta)
        self._wake()

    def finish(self, end: End | RefusalError) -> None:
        """The last that happens to it."""
        if self.end is None:
            self.end, self.ended_s = end, perf_counter()
            self._wake()

    def start_over(self) -> None:
        """Forget what came of an answer that nobody has seen."""
        self._deltas.clear()
        self.tokens, self.first_token_s = 0, 0.0

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def ticks(seconds: float | None) -> int:
    """Seconds as ticks of the simulator; NEVER for None."""
    return NEVER if seconds is None else round(seconds * TICKS_PER_S)
