"""What a measured bundle keeps of one model: timed shapes, every sample, and how the fit fared."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float64, Int64

from calibrate import bundle as files
from calibrate.bundle import FitRecord
from calibrate.fit import StepTable
from sim.profile import Bundle, ModelProfile


@dataclass(frozen=True, eq=False)
class Samples:
    """N timed steps; NaN where the machine did not say."""

    round: Int64[np.ndarray, " N"]  # in which its shape was visited
    relative: Float64[np.ndarray, " N"]  # to the median of its shape
    outlier: Bool[np.ndarray, " N"]
    clock_mhz: Float64[np.ndarray, " N"]
    temperature_c: Float64[np.ndarray, " N"]


@dataclass(frozen=True, eq=False)
class Record:
    """One model's measurements; S shapes."""

    name: str
    profile: ModelProfile
    fit: FitRecord
    table: StepTable
    held_out: Float64[np.ndarray, " S"]  # relative error while the shape was held out
    host_s: Float64[np.ndarray, " S"]  # median: before and after the computation
    device_s: Float64[np.ndarray, " S"]  # median, by the device's own clock; NaN where it has none
    samples: Samples

    @classmethod
    def read(cls, bundle: Bundle, model: str) -> Self:
        """The record of one of the bundle's models.

        Raises:
            ConfigError: if nothing of it was measured.
        """
        table = files.read_table(bundle, model)
        return cls(
            name=model,
            profile=bundle.models[model],
            fit=files.read_fit(bundle, model),
            table=files.read_step_table(bundle, model),
            held_out=_floats(table, "held_out_error"),
            host_s=_floats(table, "host_s"),
            device_s=_floats(table, "device_s"),
            samples=_samples(files.read_samples(bundle, model)),
        )


def _samples(table: pa.Table) -> Samples:
    step_s = sum(_floats(table, name) for name in ("prepare_s", "compute_s", "update_s"))
    step_s = np.asarray(step_s)
    key = 2 * table["shape"].to_numpy() + table["switched"].to_numpy()
    relative, outlier = np.empty(len(key)), np.empty(len(key), bool)
    for each in np.unique(key):
        rows = key == each
        relative[rows] = step_s[rows] / np.median(step_s[rows])
        outlier[rows] = files.far(step_s[rows])
    return Samples(
        round=table["round"].to_numpy(),
        relative=relative,
        outlier=outlier,
        clock_mhz=_floats(table, "clock_mhz"),
        temperature_c=_floats(table, "temperature_c"),
    )


def _floats(table: pa.Table, name: str) -> Float64[np.ndarray, " N"]:
    """A column, with NaN where it has no value."""
    return np.asarray(table[name].cast(pa.float64()).to_numpy())
