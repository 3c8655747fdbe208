"""Latencies of a recorded run and of its replay, and how far apart they are."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float64
from pydantic import JsonValue

from calibrate.recorded.run import Requests
from sim.config import ConfigError
from sim.ticks import array_to_seconds
from sim.types import Result

STATISTICS = ("mean", "median", "P90", "P95", "P99")
KINDS = {  # of latency -> what it is, and LLMServingSim's name for it
    "ttft_s": ("to the first token", "TTFT"),
    "tpot_s": ("per token after the first", "TPOT"),
    "e2e_s": ("to the last token", "Latency"),
}
AIMS = {  # of the relative error
    ("tpot_s", "mean"): 0.02,
    ("e2e_s", "mean"): 0.02,
    **{("ttft_s", statistic): 0.05 for statistic in STATISTICS[1:]},
}
SUMMARY_ROW = re.compile(
    r"^(?P<name>\w+) +(?P<statistic>\w+) +[\d.]+ +[\d.]+ +(?P<error>[+-][\d.]+)%$", re.MULTILINE
)

Latencies = Mapping[str, Float64[np.ndarray, " N"]]  # kind -> seconds


@dataclass(frozen=True)
class Row:
    """One statistic of one kind of latency: seconds as recorded and simulated, and the errors."""

    kind: str
    statistic: str
    recorded_s: float
    simulated_s: float
    llmservingsim_error: float | None  # of LLMServingSim on the same run; None: not known

    @property
    def error(self) -> float:
        """Relative error of the simulation."""
        return self.simulated_s / self.recorded_s - 1

    @property
    def aim(self) -> float | None:
        """What the size of the error should not exceed."""
        return AIMS.get((self.kind, self.statistic))

    @property
    def missed(self) -> bool:
        """Whether the error exceeds its aim."""
        return self.aim is not None and abs(self.error) > self.aim

    def document(self) -> dict[str, JsonValue]:
        """The row as JSON."""
        return {
            "kind": self.kind,
            "statistic": self.statistic,
            "recorded_s": self.recorded_s,
            "simulated_s": self.simulated_s,
            "error": self.error,
            "llmservingsim_error": self.llmservingsim_error,
            "aim": self.aim,
        }


def latencies(requests: Requests) -> Latencies:
    """What a run's requests waited for their tokens, from their arrival."""
    first, last = requests.first_token_s, requests.last_token_s
    return _latencies(requests, first, last)


def replayed(requests: Requests, result: Result) -> Latencies:
    """The same of a replay of those requests."""
    first = array_to_seconds(result.first_token_ticks)
    return _latencies(requests, first, array_to_seconds(result.leave_ticks))


def compare(
    recorded: Latencies, simulated: Latencies, others: Mapping[tuple[str, str], float]
) -> list[Row]:
    """A row for each kind and statistic; `others` are LLMServingSim's errors."""
    return [
        Row(kind, name, recorded_s, simulated_s, others.get((kind, name)))
        for kind in KINDS
        if recorded[kind].size
        for name, recorded_s, simulated_s in zip(
            STATISTICS, _statistics(recorded[kind]), _statistics(simulated[kind]), strict=True
        )
    ]


def read_summary(path: Path) -> dict[tuple[str, str], float]:
    """LLMServingSim's own relative errors, by kind and statistic; none if there is no file.

    Raises:
        ConfigError: if the file lacks one of them.
    """
    if not path.is_file():
        return {}
    found = {
        (row["name"], row["statistic"]): round(float(row["error"]) / 100, 6)
        for row in SUMMARY_ROW.finditer(path.read_text("utf-8"))
    }
    errors = {}
    for kind, (_, name) in KINDS.items():
        for statistic in STATISTICS:
            theirs = (name, statistic.capitalize())
            if theirs not in found:
                row = " ".join(theirs)
                raise ConfigError(str(path), row, "is missing; a row is: name, vLLM, Sim, Diff%")
            errors[kind, statistic] = found[theirs]
    return errors


def _latencies(
    requests: Requests, first_s: Float64[np.ndarray, " N"], last_s: Float64[np.ndarray, " N"]
) -> Latencies:
    later = requests.output_tokens - 1
    several = later > 0
    return {
        "ttft_s": first_s - requests.arrival_s,
        "tpot_s": (last_s - first_s)[several] / later[several],
        "e2e_s": last_s - requests.arrival_s,
    }


def _statistics(seconds: Float64[np.ndarray, " N"]) -> list[float]:
    """The mean and the percentiles of `STATISTICS`."""
    return [float(seconds.mean()), *np.percentile(seconds, (50, 90, 95, 99)).tolist()]
