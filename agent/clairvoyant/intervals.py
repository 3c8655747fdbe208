"""Intervals of time, and what requests are charged there whenever they are served."""

import numpy as np
from jaxtyping import Float64, Int64

from agent.clairvoyant.options import Options, Part

FEW = 60  # requests up to which every pair of a begin and an end is an interval
LONGER = 2.0  # each length of interval beyond, from half of a window in the median to all the time
STRIDE = 0.25  # of its length, from one interval to the next


def intervals_of(
    options: Options, n_requests: int
) -> tuple[Float64[np.ndarray, " I"], Float64[np.ndarray, " I"]]:
    """Begins and ends of the intervals whose load is limited."""
    due = np.minimum(options.due_s, options.release_s.max() + 1e4)
    if n_requests <= FEW:
        begins, ends = np.meshgrid(np.unique(options.release_s), np.unique(due), indexing="ij")
        kept = begins < ends
        return begins[kept], ends[kept]
    start, end = options.release_s.min(), due.max()
    shortest = float(np.median(due - options.release_s)) / 2
    count = max(int(np.ceil(np.log((end - start) / shortest) / np.log(LONGER))), 1)
    begins, ends = [], []
    for span in shortest * LONGER ** np.arange(count + 1):
        at = np.arange(start - span / 2, end, STRIDE * span)
        begins.append(at)
        ends.append(at + span)
    return np.concatenate(begins), np.concatenate(ends)


def meeting(
    options: Options, begin: float, end: float
) -> tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Options whose time meets an interval, and how much of it is before and after."""
    near = np.flatnonzero((options.release_s < end) & (options.due_s > begin))
    before = np.maximum(begin - options.release_s[near], 0.0)
    after = np.maximum(options.due_s[near] - end, 0.0)
    return near, before, after


def charged_inside(
    prefill: Part, decode: Part, near: Int64[np.ndarray, " n"],
    before: Float64[np.ndarray, " n"], after: Float64[np.ndarray, " n"],
) -> Float64[np.ndarray, " n"]:  # fmt: skip
    """What cannot be charged before or after."""
    prompt, later = (Part(*(values[near] for values in part)) for part in (prefill, decode))
    charged = prompt.charge_s + later.charge_s
    left: Float64[np.ndarray, " n"] = (
        charged - _done(prompt, later, before) - _done(later, prompt, after)
    )
    return left


def _done(first: Part, then: Part, time_s: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Most that is charged in so much time at one end of a request's way."""
    in_first = np.minimum(np.minimum(time_s, first.alone_s) * first.rate, first.charge_s)
    beyond = np.minimum(time_s, 1e9) - np.minimum(time_s, first.alone_s)
    done: Float64[np.ndarray, " n"] = in_first + np.minimum(beyond * then.rate, then.charge_s)
    return done
