"""The linear program of many requests, bounded by prices of the intervals.

By weak duality any prices ≥ 0 of a program's limits bound it: what all limits come to at these
prices, and for each request what its best option earns beyond what it pays, or nothing. The prices
are those that minimise a smooth stand-in for it (a soft maximum instead of the best option), made
sharper step by step; the bound is the sum itself, which holds however far they are from the best.
Smoothing as in Nesterov, "Smooth minimization of non-smooth functions" (2005).

O options, I intervals, N requests.
"""

import numpy as np
from jaxtyping import Float64, Int64
from scipy.optimize import minimize
from scipy.sparse import csr_array

SHARPER = (
    0.05,
    0.01,
    0.002,
    0.0004,
)  # widths of the soft maximum, of the most that a request earns
STEPS = 300  # of each width at the most


class Priced:
    """A program in which each request takes at most one option, and intervals have room for 1."""

    def __init__(
        self,
        request: Int64[np.ndarray, " O"],
        earns: Float64[np.ndarray, " O"],
        takes: csr_array,
    ) -> None:
        """Say what there is to choose.

        Args:
            request: Of each option, rising.
            earns: What each option is worth, > 0.
            takes: (I, O) share of an interval's room that an option takes.
        """
        first = np.flatnonzero(np.diff(request, prepend=-1))
        self._first = first
        self._of = np.repeat(np.arange(len(first)), np.diff([*first, len(request)]))
        self._earns = earns
        self._takes, self._taken = takes, takes.T

    def bound(self) -> float:
        """The least that prices tried bound the program by; it is near the optimum, never below."""
        prices = np.zeros(self._takes.shape[0])
        least = self.at(prices)
        for width in SHARPER if len(prices) else ():
            found = minimize(
                self._softly, prices, args=(width * self._earns.max(),), jac=True,
                method="L-BFGS-B", bounds=[(0.0, None)] * len(prices), options={"maxiter": STEPS},
            )  # fmt: skip
            prices = np.maximum(found.x, 0.0)
            least = min(least, self.at(prices))
        return least

    def at(self, prices: Float64[np.ndarray, " I"]) -> float:
        """What the program is at most, by these prices ≥ 0 of the room of each interval."""
        gain = self._earns - self._taken @ prices
        best = np.maximum.reduceat(gain, self._first)
        return float(prices.sum() + np.maximum(best, 0.0).sum())

    def _softly(
        self, prices: Float64[np.ndarray, " I"], width: float
    ) -> tuple[float, Float64[np.ndarray, " I"]]:
        """The same with a soft maximum, at most width · log(1 + options) above; and its slope."""
        gain = (self._earns - self._taken @ prices) / width
        best = np.maximum(np.maximum.reduceat(gain, self._first), 0.0)
        weight = np.exp(gain - best[self._of])
        total = np.exp(-best) + np.add.reduceat(weight, self._first)
        slope = 1.0 - self._takes @ (weight / total[self._of])
        return float(prices.sum() + width * (best + np.log(total)).sum()), slope
