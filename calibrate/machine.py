"""The machine that is measured: its device, versions, memory, clock and temperature."""

import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import torch
from pydantic import JsonValue

from sim.config import ConfigError


@dataclass(frozen=True)
class State:
    """What a device says of itself at a moment; None where it says nothing."""

    clock_mhz: float | None
    temperature_c: float | None


class Gauge:
    """Reads a device's clock and temperature."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def read(self) -> State:
        """The state now."""
        if self._device.type == "cuda":
            return State(
                clock_mhz=_told(lambda: torch.cuda.clock_rate(self._device)),
                temperature_c=_told(lambda: torch.cuda.temperature(self._device)),
            )
        rates = [
            float(line.partition(":")[2]) for line in _cpu_lines() if line.startswith("cpu MHz")
        ]
        zones = sorted(Path("/sys/class/thermal").glob("thermal_zone*/temp"))
        degrees = [int(zone.read_text()) / 1000 for zone in zones]
        return State(
            clock_mhz=sum(rates) / len(rates) if rates else None,
            temperature_c=max(degrees) if degrees else None,
        )


def _told(read: Callable[[], int]) -> float | None:
    """What NVIDIA's library says; None where this device does not tell."""
    try:
        return float(read())
    except Exception:  # its own kind of error, by which it says "not supported"
        return None


def find_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: if PyTorch has none.
    """
    if name == "cpu":
        return torch.device("cpu")
    if name.partition(":")[0] == "cuda" and torch.cuda.is_available():
        index = int(name.partition(":")[2] or 0)
        if index < torch.cuda.device_count():
            torch.cuda.set_device(index)
            return torch.device("cuda", index)
    here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    raise ConfigError("device", name, f"PyTorch finds here: {', '.join(here)}")


def use_cores(threads: int, cores: tuple[int, ...] | None) -> None:
    """Let PyTorch compute on so many threads, and this process run on these cores alone.

    Raises:
        ConfigError: if this process may not run on one of them.
    """
    torch.set_num_threads(threads)
    if cores is None:
        return
    allowed = os.sched_getaffinity(0)
    if not cores or not set(cores) <= allowed:
        raise ConfigError("cores", list(cores), f"some of {sorted(allowed)}")
    os.sched_setaffinity(0, cores)


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    named = [
        line.partition(":")[2].strip() for line in _cpu_lines() if line.startswith("model name")
    ]
    return named[0] if named else platform.processor() or platform.machine()


def memory_bytes(device: torch.device) -> int:
    """The device's memory; of a CPU, the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_bytes(device: torch.device, utilization: float) -> int:
    """What is left for models: that share of the device's memory, less what is in use by now."""
    total = memory_bytes(device)
    used = total - torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return int(utilization * total) - used


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most that PyTorch has held on the device so far; None on a CPU."""
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else None


def environment(device: torch.device) -> dict[str, str]:
    """What else a step's time may depend on: driver, versions, threads."""
    found = {
        "device": device_name(device),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": str(torch.get_num_threads()),
        "cores": str(len(os.sched_getaffinity(0))),
    }
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        found["driver"] = _driver()
    return found


def peaks(device: torch.device, dtype: str) -> dict[str, JsonValue]:
    """What the device reaches at best, as a datasheet has it: timed, with PyTorch's threads.

    The best of several products of square matrices, and of several copies much larger than caches.
    """
    kind = getattr(torch, dtype)
    width, size = (8192, 2**30) if device.type == "cuda" else (1536, 2**27)
    left, right = (torch.rand(width, width, device=device, dtype=kind) for _ in range(2))
    source = torch.zeros(size // kind.itemsize, device=device, dtype=kind)
    target = torch.empty_like(source)
    product_s = _best_s(lambda: torch.mm(left, right), device)
    copy_s = _best_s(lambda: target.copy_(source), device)
    return {
        "flops_per_s": {dtype: 2 * width**3 / product_s},
        "bandwidth_bytes_per_s": 2 * size / copy_s,
        "memory_bytes": memory_bytes(device),
        "source": f"timed on this device: products of {width} x {width}, copies of {size} bytes",
    }


def _best_s(run: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(10):
        begin = perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(perf_counter() - begin)
    return min(seconds)


def _driver() -> str:
    """The version of NVIDIA's driver, as its own tool tells it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"not told by nvidia-smi: {error}"
    return told.splitlines()[0]


def _cpu_lines() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
