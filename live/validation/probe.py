"""A look at idle workers: how fast they are now, alone and at once, and the time around steps."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from time import perf_counter

import numpy as np
from jaxtyping import Float64

from live.backend import Job, Progress
from live.validation.requests import FIRST_TOKEN_ID
from live.validation.steps import RealSteps, gap_s, predicted_s
from live.validation.watch import Nobody, Watch
from sim.profile import Bundle
from sim.types import Cluster

PROMPT_TOKENS, OUTPUT_TOKENS = 16, 12  # of a request that probes
PATIENCE_S = 60.0


@dataclass(frozen=True, eq=False)
class Probe:
    """What one look at D devices found; of the largest model on each."""

    alone: Float64[np.ndarray, " D"]  # its steps over those predicted, the other devices idle
    together: Float64[np.ndarray, " D"]  # the same with all devices busy
    overhead_s: float  # to the queue and from the end of a step, beside the step itself; median
    gap_s: float  # between two steps of a device; mean

    @property
    def contention(self) -> float:
        """How many times as long steps take where all devices are busy."""
        return float(np.mean(self.together / self.alone))


class _Listener(Nobody):
    """Hears the ends of jobs."""

    def __init__(self) -> None:
        self.ended = asyncio.Queue[int]()

    def stepped(self, replica: str, progress: Progress) -> None:
        """As of `Events`."""
        for job, _ in progress.finished:
            self.ended.put_nowait(job)

    def failed(self, job: int, reason: str) -> None:
        """As of `Events`."""
        raise RuntimeError(f"a worker failed: {reason}")

    def refused(self, job: int, status: int, message: str) -> None:
        """As of `Events`."""
        raise RuntimeError(f"a worker refused a request: {message}")


async def probe(watches: Sequence[Watch], cluster: Cluster, bundle: Bundle) -> Probe:
    """Let each device answer a request alone, then all of them at once.

    Raises:
        TimeoutError: if a worker does not answer.
    """
    listener, numbers = _Listener(), count()
    overheads, gaps = [], []

    async def ask(asked: Sequence[Watch]) -> list[float]:
        """Each asked device's step times over those predicted."""
        for watch in watches:
            watch.listen(listener)
        begin_s = perf_counter()
        for watch in asked:
            watch.submit(_job(next(numbers), watch.replicas[-1]))
        async with asyncio.timeout(PATIENCE_S):
            for _ in asked:
                await listener.ended.get()
        ratios = []
        for watch in asked:
            steps = RealSteps.of(watch.steps)
            overheads.append(steps.ended_s[0] - begin_s - steps.step_s[0])
            if (gap := gap_s(steps, cluster)) is not None:
                gaps.append(gap)
            ratios.append(
                float(np.median((steps.step_s / predicted_s(steps, cluster, bundle))[1:]))
            )
        return ratios

    alone = [(await ask([watch]))[0] for watch in watches]
    together = await ask(watches)
    return Probe(
        np.array(alone), np.array(together), float(np.median(overheads)), float(np.mean(gaps))
    )


def _job(number: int, replica: str) -> Job:
    return Job(
        id=number, replica=replica, model=replica.partition("/")[2], endpoint="completions",
        body={}, prompt=(FIRST_TOKEN_ID,) * PROMPT_TOKENS, max_tokens=OUTPUT_TOKENS, stop=(),
        ignore_eos=True, forced_tokens=OUTPUT_TOKENS, first_within_s=None, finish_within_s=None,
        pinned=False,
    )  # fmt: skip
