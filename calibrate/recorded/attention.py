"""Measured attention times of one layer by the shape of the batch, and lookups in between.

The tables are products of a few axes, some overlaid on others, so that not every corner of a cell
was measured. Contexts are interpolated along the measured ones of each corner of the others, and
beyond the last ones they go on in a line.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from calibrate.recorded.files import number, read_table
from sim.config import ConfigError

US = 1e-6
COLUMNS = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")

Floats = Float64[np.ndarray, " K"]
Line = tuple[Floats, Floats]  # contexts and seconds


@dataclass(frozen=True, eq=False)
class AttentionTimes:
    """Seconds of one layer's attention.

    `decode` by number of decodes, over their context; `prefill` by tokens of the chunk, over what
    was computed before; `mixed` by chunk and number of decodes, over the decodes' context, for a
    chunk that begins its prompt.
    """

    decode: Mapping[int, Line]
    prefill: Mapping[int, Line]
    mixed: Mapping[tuple[int, int], Line]

    def decode_s(self, decodes: float, context: float) -> float:
        """Seconds for decodes of one context each."""
        return _between(self.decode, decodes, lambda number: _along(self.decode[number], context))

    def prefill_s(self, chunk: float) -> float:
        """Seconds for a chunk that begins its prompt, alone."""
        return _between(self.prefill, chunk, lambda tokens: _along(self.prefill[tokens], 0.0))

    def mixed_s(self, chunk: float, decodes: float, context: float) -> float:
        """Seconds for a chunk that begins its prompt, and decodes of one context each."""
        if decodes == 0:
            return self.prefill_s(chunk)
        return _between(
            self.mixed_decodes,
            chunk,
            lambda tokens: _between(
                self.mixed_decodes[tokens],
                decodes,
                lambda number: _along(self.mixed[tokens, number], context),
            ),
        )

    @cached_property
    def mixed_decodes(self) -> Mapping[int, Mapping[int, None]]:
        """The numbers of decodes measured with each chunk."""
        found: dict[int, dict[int, None]] = {}
        for chunk, decodes in self.mixed:
            found.setdefault(chunk, {})[decodes] = None
        return found


def read_attention(path: Path, max_tokens: int, max_sequences: int) -> AttentionTimes:
    """Read `attention.csv` for steps of up to so many tokens and sequences.

    Raises:
        ConfigError: if it is missing or malformed, or ends before the largest step.
    """
    points: dict[tuple[int, int, int], dict[float, float]] = {}
    for place, texts in read_table(path, COLUMNS):
        chunk, before, decodes, context, time_us = (
            number(text, place, key, 0) for key, text in zip(COLUMNS, texts, strict=True)
        )
        if decodes and chunk and before:
            continue  # what a chunk's own history adds is the pair coefficient's
        at, over = (int(chunk), int(decodes)), context if decodes else before
        points.setdefault((*at, bool(decodes)), {})[over] = time_us * US
    lines = {
        (chunk, decodes): (np.array(sorted(own)), np.array([own[at] for at in sorted(own)]))
        for (chunk, decodes, _), own in points.items()
        if len(own) > 1
    }
    times = AttentionTimes(
        decode={n: line for (c, n), line in lines.items() if c == 0 and n},
        prefill={c: line for (c, n), line in lines.items() if n == 0 and c},
        mixed={(c, n): line for (c, n), line in lines.items() if c and n},
    )
    for key, measured, largest in (
        ("n_decode without a chunk", list(times.decode), max_sequences),
        ("n_decode with a chunk", [n for _, n in times.mixed], max_sequences),
        ("prefill_chunk without decodes", list(times.prefill), max_tokens),
        ("prefill_chunk with decodes", [c for c, _ in times.mixed], max_tokens),
    ):
        if max(measured, default=0) < largest:
            raise ConfigError(
                f"{path}: {key}",
                max(measured, default=0),
                f"must reach {largest}, the largest step of the engine",
            )
    return times


def slope(lines: Mapping[int, Line], work: Callable[[int, Floats], Floats]) -> float:
    """Seconds per unit of work, the same for all lines, each line having an offset of its own.

    Least squares with the weight 1/time. `work(key, contexts)` is the work of a line's points.
    """
    over = under = 0.0
    for key, (contexts, seconds) in lines.items():
        units, weights = work(key, contexts), 1 / seconds
        mean_units = np.average(units, weights=weights)
        mean_seconds = np.average(seconds, weights=weights)
        over += float(np.sum(weights * (units - mean_units) * (seconds - mean_seconds)))
        under += float(np.sum(weights * (units - mean_units) ** 2))
    return over / under


def _between(keys: Iterable[int], at: float, value: Callable[[int], float]) -> float:
    """Linear between the values of the two keys around `at`; constant beyond the ends."""
    ordered = sorted(keys)
    above = bisect_left(ordered, at)
    if above == 0 or above == len(ordered):
        return value(ordered[min(above, len(ordered) - 1)])
    low, high = ordered[above - 1], ordered[above]
    share = (at - low) / (high - low)
    return (1 - share) * value(low) + share * value(high)


def _along(line: Line, context: float) -> float:
    """Linear along a line, constant before its first point, straight on after its last."""
    contexts, seconds = line
    if context <= contexts[-1]:
        return float(np.interp(context, contexts, seconds))
    rate = (seconds[-1] - seconds[-2]) / (contexts[-1] - contexts[-2])
    return float(seconds[-1] + rate * (context - contexts[-1]))
