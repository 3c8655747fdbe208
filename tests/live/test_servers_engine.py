"""A real engine behind HTTP, in a process of its own, is a replica like any other."""

import asyncio
import json

import pytest

from tests.calibrate import tiny
from tests.live.heard import job
from tests.live.rig import in_front, process

torch = tiny.torch  # skips where it is missing
SETTINGS = {"max_batch": 8, "token_budget": 128, "block_tokens": 16, "kv_tokens": 8192}


@pytest.mark.slow
def test_a_real_engine_answers_jobs_together() -> None:
    async def play() -> None:
        async with in_front(port, timeouts={"first_byte_s": 60, "between_s": 60}) as (
            backend, heard,
        ):  # fmt: skip
            jobs = [job(8 + n, prompt=list(range(5, 25 + n))) for n in range(12)]
            for asked in jobs:
                backend.submit(asked)
            for asked in jobs:
                assert await heard.end(asked) == "length", heard.told
            assert [heard.tokens(asked) for asked in jobs] == [8 + n for n in range(12)]
            said = [heard.prompt_tokens[asked.id] for asked in jobs]
            assert said == [20 + n for n in range(12)]

    with process("tests.calibrate.served_engine", "opt-1m", json.dumps(SETTINGS)) as (_, port):
        asyncio.run(play())
