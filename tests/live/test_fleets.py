"""Fleets follow one another while requests are inside."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from agent.checkpoint import save
from live.call import End
from live.deployment import Plan
from live.dispatcher import Dispatcher, Limits
from live.fleets import Fleets, make_deciders
from live.limit import TimeLimit
from sim.config import ConfigError
from tests.agent.test_checkpoint import make_checkpoint
from tests.live.deployments import planned
from tests.live.scripted import Remembered, ScriptedBackend, incoming

LIMIT = TimeLimit(30.0)
WORKERS = [{"kind": "worker", "name": "left"}, {"kind": "worker", "name": "right"}]
RENEWED = [{"kind": "worker", "name": "left"}, {"kind": "worker", "name": "new"}]


class Starting(ScriptedBackend):
    """Takes jobs when it is told that it does, or never will."""

    def __init__(self, plan: Plan, number: int) -> None:
        name = plan.spec.backends[number].name
        super().__init__(name, tuple(r for r in plan.replicas if r.startswith(f"{name}/")))
        self.well: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.stopped = 0
        self.ending: asyncio.Event | None = None  # what stopping waits for

    async def ready(self) -> None:
        await self.well

    async def stop(self, drain_s: float) -> None:
        self.stopped += 1
        if self.ending is not None:
            await self.ending.wait()

    def come_up(self) -> None:
        for replica in self.replicas:
            self.events.up(replica)
        self.well.set_result(None)


class Yard:
    def __init__(self) -> None:
        self.made: dict[str, Starting] = {}
        self.dispatcher = Dispatcher(None, Limits(3, 100), Remembered(), seed=0)
        self.fleets = Fleets(self.make, self.dispatcher)

    def make(self, plan: Plan, number: int) -> Any:
        backend = Starting(plan, number)
        self.made[backend.name] = backend
        return backend

    async def build(self, plan: Plan, ready_s: float | None) -> Any:
        return await self.fleets.build(plan, make_deciders(plan, LIMIT), ready_s)

    async def begin(self, plan: Plan) -> None:
        self.dispatcher.replace(await self.build(plan, None))
        for backend in self.made.values():
            backend.come_up()


def in_a_yard(test: Callable[[Yard], Awaitable[None]]) -> None:
    async def run() -> None:
        await test(Yard())

    asyncio.run(run())


def test_a_request_on_a_replaced_backend_comes_to_its_end() -> None:
    async def test(yard: Yard) -> None:
        await yard.begin(planned(backends=WORKERS))
        asked = [yard.dispatcher.admit(incoming(task="piqa")) for _ in range(8)]
        renewed = planned(backends=RENEWED)
        building = asyncio.create_task(yard.build(renewed, 30.0))
        await asyncio.sleep(0)
        assert not building.done()  # the new one is not up yet
        yard.made["new"].come_up()
        yard.dispatcher.replace(await building)
        await yard.fleets.retire(renewed, 5.0)
        assert (yard.made["right"].stopped, yard.made["left"].stopped) == (1, 0)
        later = [yard.dispatcher.admit(incoming(task="piqa")) for _ in range(8)]
        assert {c.replica.partition("/")[0] for c in asked + later} == {"left", "right", "new"}
        for backend in yard.made.values():
            for job in [*backend.jobs]:
                backend.emit(job)
                backend.finish(job)
        assert all(isinstance(call.end, End) for call in asked + later)
        assert yard.dispatcher.fleet.ledger.jobs == 0

    in_a_yard(test)


def test_what_runs_is_kept_with_its_jobs() -> None:
    async def test(yard: Yard) -> None:
        await yard.begin(planned(backends=WORKERS))
        first = [*yard.made.values()]
        yard.dispatcher.admit(incoming(task="piqa"))
        again = planned("policy@policy.active=least_loaded", backends=WORKERS)
        yard.dispatcher.replace(await yard.build(again, 30.0))
        assert [*yard.made.values()] == first
        assert yard.dispatcher.fleet.ledger.jobs == 1
        assert yard.dispatcher.fleet.ledger.alive.all()
        assert yard.dispatcher.fleet.decider.version == "least_loaded"

    in_a_yard(test)


def test_a_fleet_that_does_not_come_up_leaves_the_old_one() -> None:
    async def test(yard: Yard) -> None:
        await yard.begin(planned(backends=WORKERS))
        before = yard.dispatcher.fleet
        building = asyncio.create_task(yard.build(planned(backends=RENEWED), 0.05))
        with pytest.raises(ConfigError, match=r"\['new'\]: not ready within 0.05 s"):
            await building
        assert yard.made["new"].stopped == 1
        assert yard.dispatcher.fleet is before
        assert len(yard.fleets.backends) == 2

    in_a_yard(test)


def test_a_backend_with_other_settings_needs_another_name() -> None:
    async def test(yard: Yard) -> None:
        await yard.begin(planned(backends=WORKERS))
        with pytest.raises(ConfigError, match="'left': runs with other settings"):
            await yard.build(planned("cluster.max_batch=4", backends=WORKERS), 1.0)

    in_a_yard(test)


def test_a_policy_that_cannot_serve_is_refused_before_anything_starts(tmp_path: Path) -> None:
    save(make_checkpoint(), tmp_path / "paper")  # for the models of another cluster alone

    async def test(yard: Yard) -> None:
        router = f"policy.active.checkpoint={tmp_path / 'paper'}"
        learned = planned("policy@policy.active=learned", router, backends=WORKERS)
        with pytest.raises(ConfigError, match="models"):
            await yard.build(learned, None)
        assert not yard.made

    in_a_yard(test)


def test_a_name_is_not_used_again_while_its_backend_ends_what_is_inside() -> None:
    async def test(yard: Yard) -> None:
        await yard.begin(planned(backends=WORKERS))
        ending = asyncio.Event()
        yard.made["right"].ending = ending
        renewed = planned(backends=RENEWED)
        building = asyncio.create_task(yard.build(renewed, 5.0))
        await asyncio.sleep(0)
        yard.made["new"].come_up()
        yard.dispatcher.replace(await building)
        retiring = asyncio.create_task(yard.fleets.retire(renewed, 5.0))
        await asyncio.sleep(0)
        with pytest.raises(ConfigError, match=r"right.*still ends"):
            await yard.build(planned(backends=WORKERS), None)
        ending.set()
        await retiring
        await yard.build(planned(backends=WORKERS), None)

    in_a_yard(test)
