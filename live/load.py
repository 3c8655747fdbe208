"""An open-loop load generator: requests are sent when they are due, whatever became of the others.

The clock is `time.perf_counter`. An event loop sleeps to the millisecond; the rest of the time is
spent turning the loop round and round, so that answers are heard meanwhile.
"""

import asyncio
from collections.abc import Callable
from time import perf_counter

import numpy as np
from jaxtyping import Float64

SPIN_S = 1.5e-3  # before a request is due; an event loop may sleep a millisecond too long


async def send_on_time(
    due_s: Float64[np.ndarray, " N"], send: Callable[[int], None]
) -> Float64[np.ndarray, " N"]:
    """Send request i at `due_s[i]`; those that are late by now are sent one after the other.

    Args:
        due_s: When each is due, in order.
        send: Sends one, by its number, without blocking.

    Returns:
        By how many seconds each was sent late.
    """
    late_s = np.zeros(len(due_s))
    for number, due in enumerate(due_s.tolist()):
        left = due - perf_counter()
        if left > SPIN_S:
            await asyncio.sleep(left - SPIN_S)
        while perf_counter() < due:
            await asyncio.sleep(0)
        late_s[number] = perf_counter() - due
        send(number)
    return late_s
