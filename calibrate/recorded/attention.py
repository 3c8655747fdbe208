"""Measured attention times of one layer by the shape of the batch, and lookups in between.

The tables are products of a few axes, some overlaid on others, so that not every corner of a cell
was measured. Contexts are interpolated along the measured ones of each corner of the others.
Beyond the last one measured, every axis goes on in a straight line.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from jaxtyping import Float64

from calibrate.files import number, read_table
from sim.config import ConfigError

US = 1e-6
COLUMNS = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us")

T = TypeVar("T")
Floats = Float64[np.ndarray, " K"]
Line = tuple[Floats, Floats]  # contexts and seconds


@dataclass(frozen=True, eq=False)
class AttentionTimes:
    """Seconds of one layer's attention.

    `decode` by number of decodes, over their context; `prefill` by tokens of the chunk, over what
    was computed before; `mixed` by chunk, then number of decodes, over the decodes' context, for
    a chunk that begins its prompt.
    """

    decode: Mapping[int, Line]
    prefill: Mapping[int, Line]
    mixed: Mapping[int, Mapping[int, Line]]

    def decode_s(self, decodes: float, context: float) -> float:
        """Seconds for decodes of one context each."""
        return _between(self.decode, decodes, lambda line: _along(line, context))

    def prefill_s(self, chunk: float) -> float:
        """Seconds for a chunk that begins its prompt, alone."""
        return _between(self.prefill, chunk, lambda line: _along(line, 0.0))

    def mixed_s(self, chunk: float, decodes: float, context: float) -> float:
        """Seconds for a chunk that begins its prompt, and decodes of one context each."""
        if decodes == 0:
            return self.prefill_s(chunk)
        return _between(
            self.mixed,
            chunk,
            lambda lines: _between(lines, decodes, lambda line: _along(line, context)),
        )


def read_attention(path: Path) -> AttentionTimes:
    """Read `attention.csv`.

    Raises:
        ConfigError: if it is missing or malformed, or has no rows of a kind.
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
    mixed: dict[int, dict[int, Line]] = {}
    for (c, n), line in lines.items():
        if c and n:
            mixed.setdefault(c, {})[n] = line
    times = AttentionTimes(
        decode={n: line for (c, n), line in lines.items() if c == 0 and n},
        prefill={c: line for (c, n), line in lines.items() if n == 0 and c},
        mixed=mixed,
    )
    for key, found in (
        ("n_decode > 0 without a chunk", times.decode),
        ("prefill_chunk > 0 without decodes", times.prefill),
        ("prefill_chunk > 0 with decodes", times.mixed),
    ):
        if not found:
            raise ConfigError(f"{path}: {key}", "", "needs rows, at two contexts or more")
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


def straight(keys: Sequence[float] | Floats, at: float, value: Callable[[int], float]) -> float:
    """Linear between the values at rising `keys`; constant before the first, straight on at last.

    `value` takes the position of a key.
    """
    if len(keys) == 1 or at <= keys[0]:
        return value(0)
    above = min(int(np.searchsorted(keys, at)), len(keys) - 1)
    share = (at - keys[above - 1]) / (keys[above] - keys[above - 1])
    return float((1 - share) * value(above - 1) + share * value(above))


def _between(lines: Mapping[int, T], at: float, value: Callable[[T], float]) -> float:
    """As `straight`, over a mapping."""
    keys = sorted(lines)
    return straight(keys, at, lambda position: value(lines[keys[position]]))


def _along(line: Line, context: float) -> float:
    """As `straight`, over a line's contexts."""
    contexts, seconds = line
    return straight(contexts, context, lambda position: float(seconds[position]))
