"""More requests than a server has slots for, at the pace of a clock, whatever becomes of them."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory

import aiohttp

from sim.profile import Bundle, StepTime, load_bundle, save_bundle
from tests.live.campaign import FAR, before_one
from tests.live.client import Reply, Request, ask
from tests.live.emulated_server import Emulated, Server
from tests.live.served import Served

TOKENS = 4
SERVER = Emulated(ttft_s=0.08, tpot_s=0.04, slots=4, echoes=True)
CAPACITY_RPS = SERVER.slots / (SERVER.ttft_s + (TOKENS - 1) * SERVER.tpot_s)
TIMES = 3.0  # the capacity
E2E_S = 2.0
LOOK_S = 0.02  # between two looks at the server's slots


@dataclass
class Overload:
    """A gateway before one server, and what it did under load."""

    served: Served
    session: aiohttp.ClientSession
    server: Server
    replies: list[Reply] = field(default_factory=list)
    busy: list[int] = field(default_factory=list)  # slots, whenever it was looked
    memory_mb: list[float] = field(default_factory=list)  # likewise
    lasted_s: float = 0.0

    async def play(self, seconds: float, seed: int = 0) -> None:
        """Send requests with exponential pauses; all of them have ended then."""
        random, loop = Random(seed), asyncio.get_running_loop()
        began_s = due_s = loop.time()
        async with asyncio.TaskGroup() as together:
            looking = together.create_task(self._look())
            asking = []
            while due_s < began_s + seconds:
                request = Request(f"r{len(asking)}", f"{len(asking)} hands", TOKENS,
                                  stream=random.random() < 0.5, e2e_s=E2E_S)  # fmt: skip
                asking.append(together.create_task(ask(self.session, request)))
                due_s += random.expovariate(TIMES * CAPACITY_RPS)
                await asyncio.sleep(due_s - loop.time())
            self.lasted_s = loop.time() - began_s
            self.replies = [await task for task in asking]
            looking.cancel()

    async def alone_s(self, times: int = 5) -> float:
        """How long a request takes that meets no other."""
        found = []
        for number in range(times):
            reply = await ask(self.session, Request(f"alone{number}", "all alone", TOKENS))
            assert reply.outcome == "length", reply
            found.append(reply.seconds)
        return median(found)

    @property
    def goodput(self) -> float:
        """Answers in time, as a share of what the server could give."""
        good = sum(reply.answered and reply.seconds <= E2E_S for reply in self.replies)
        return good / (self.lasted_s * CAPACITY_RPS)

    @property
    def occupied(self) -> float:
        """The share of the server's slots that was in use."""
        return sum(self.busy) / (len(self.busy) * SERVER.slots)

    @property
    def table(self) -> str:
        """What became of requests, for people."""
        outcomes = Counter(reply.outcome for reply in self.replies).most_common()
        answered_s = sorted(reply.seconds for reply in self.replies if reply.answered)
        told_s = sorted(reply.seconds for reply in self.replies if not reply.answered)
        return "\n".join([
            *(f"{name:20} {count:6}" for name, count in outcomes),
            f"{len(self.replies)} requests in {self.lasted_s:.0f} s, {TIMES:g} times capacity; "
            f"goodput {self.goodput:.0%} of it, slots {self.occupied:.0%} in use; answered in "
            f"{median(answered_s):.2f} s, {answered_s[-1]:.2f} s at most, refused in "
            f"{1e3 * median(told_s):.0f} ms; memory "
            f"{self.memory_mb[0]:.0f} MB, {max(self.memory_mb):.0f} at most",
        ])  # fmt: skip

    async def _look(self) -> None:
        while True:
            self.busy.append(self.server.running)
            self.memory_mb.append(self.served.memory_mb())
            await asyncio.sleep(LOOK_S)


@asynccontextmanager
async def overload(*arguments: str) -> AsyncIterator[Overload]:
    """Everything up, with a profile of the server, and what else the deployment is to say."""
    with TemporaryDirectory() as folder:
        profile = f"cluster.profile={profile_of(SERVER, Path(folder))}"
        async with before_one(SERVER, profile, *arguments) as (served, session, server):
            yield Overload(served, session, server)


def profile_of(emulated: Emulated, folder: Path) -> str:
    """A profile in which the model of the server takes as long as it does there."""
    shipped = load_bundle("pkg://calibrate.profiles/cpu-epyc-1-thread")
    nothing = ((0, 0.0), (4096, 0.0))
    steps = StepTime(
        host_s=emulated.tpot_s, prompt_s=emulated.ttft_s - emulated.tpot_s, tokens_s=nothing,
        pair_s=0.0, kv_token_s=0.0,
    )  # fmt: skip
    changes = {"step_time": steps, "envelope": None, "replicates": ()}
    models = {**shipped.models, FAR: shipped.models[FAR].model_copy(update=changes)}
    meta = shipped.meta.model_copy(update={"attachments": {}})
    save_bundle(Bundle(meta, models, shipped.quality), folder / "emulated")
    return str(folder / "emulated")
