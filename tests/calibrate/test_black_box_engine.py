"""A real engine behind HTTP, calibrated from outside."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from calibrate.black_box.bundle import read_fit
from sim.profile import load_bundle, step_seconds
from tests.calibrate import tiny

torch = tiny.torch  # skips where it is missing
SETTINGS = {"max_batch": 8, "token_budget": 128, "block_tokens": 16, "kv_tokens": 8192}


@pytest.fixture
def url() -> Iterator[str]:
    words = ["-m", "tests.calibrate.served_engine", "opt-1m", json.dumps(SETTINGS)]
    with subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, text=True) as served:
        assert served.stdout is not None
        yield f"http://127.0.0.1:{served.stdout.readline().strip()}"
        served.terminate()


def test_a_real_engine_is_calibrated_from_outside(url: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "calibrate.run", f"url={url}", f"out={tmp_path / 'bundle'}",
            "quality.models=[opt-125m]", "black_box.concurrency=[1,4]", "black_box.requests=12",
            "black_box.prompt_tokens=[16,64]", "black_box.output_tokens=[16,32]",
            "black_box.vocabulary=1000", "black_box.scheduler=transformers_fifo",
            *(f"black_box.server.{name}={value}" for name, value in SETTINGS.items()),
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    bundle = load_bundle(str(tmp_path / "bundle"))
    record = read_fit(bundle)
    assert bundle.meta.kind == "black-box"
    assert record.cells == 8
    # how near it comes is the machine's noise here: a quiet one's figures are in the README
    assert record.steps_unlike + record.steps_unclear < 0.5 * record.steps_seen
    assert record.latencies["end-to-end latency, mean"].shapes == 8
    assert "end-to-end latency, mean" in done.stdout
    step_time = bundle.models["opt-1m"].step_time
    alone, among = (step_seconds(step_time, n, n, 0, 40 * n) for n in (1, 4))
    assert 1e-4 < alone <= among < 1
