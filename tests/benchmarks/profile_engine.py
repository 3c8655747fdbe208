"""What the engine gains by its attention and by the memory that it keeps.

The command `python -m tests.benchmarks.profile_engine`.

Times one decode step of `opt-5m` on one thread in each variant, each in a process of its own.
"""

import subprocess
import sys

import numpy as np
import torch

from calibrate import engine as room
from calibrate.engine import Engine
from calibrate.engine_spec import EngineSpec
from calibrate.microbench import time_step
from calibrate.shapes import Shape

DECODES, CONTEXT, REPEATS = 32, 300, 30
VARIANTS = {  # attention, whether freed memory is kept
    "ragged attention, memory kept": ("paged|ragged", True),
    "ragged attention, memory given back": ("paged|ragged", False),
    "transformers' paged|sdpa, memory kept": ("paged|sdpa", True),
}


def median_ms(attention: str, keeps: bool) -> float:
    """Milliseconds of the step."""
    torch.set_num_threads(1)
    if not keeps:
        room.keep_freed_memory = lambda: False
    spec = EngineSpec(
        max_batch=DECODES, token_budget=256, block_tokens=16, kv_tokens=16_384, dtype="float32",
        seed=0,
    )  # fmt: skip
    engine = Engine("opt-5m", torch.device("cpu"), spec)
    if attention != room.ragged_attention.NAME:
        engine.model.set_attn_implementation(attention)
        engine._processor = engine._manager._create_batch_processor()
    shape = Shape(contexts=(CONTEXT,) * DECODES)
    steps = [time_step(engine, shape) for _ in range(REPEATS)]
    engine.close()
    return 1000 * float(np.median([step.end_s - step.begin_s for step in steps[3:]]))


def main() -> None:
    """Time every variant and print a line for each."""
    if len(sys.argv) > 1:
        print(median_ms(*VARIANTS[sys.argv[1]]))
        return
    print(f"a step of {DECODES} decodes of {CONTEXT} cached tokens, opt-5m, one thread")
    for name in VARIANTS:
        words = [sys.executable, "-m", "tests.benchmarks.profile_engine", name]
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        print(f"{float(told.splitlines()[-1]):8.1f} ms  {name}")


if __name__ == "__main__":
    main()
