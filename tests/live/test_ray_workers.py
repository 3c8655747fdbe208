"""Workers on the nodes of a Ray cluster: two nodes on this machine, by Ray's own utility."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="needs the ray extra")
pytest.importorskip("uvicorn", reason="needs the live extra")

import ray
from ray.cluster_utils import Cluster

from tests.calibrate import tiny

# isort: split
from calibrate.engine_spec import EngineSpec
from live.workers.actors import LaunchActor
from live.workers.backend import PatienceSpec, Workers
from live.workers.device import DeviceSpec, HostedModel, RayNeeds
from live.workers.process import Load
from live.workers.process import load as load_engines
from live.workers.tokenizer import ByteTokenizer
from tests.live import stub_worker
from tests.live.recorded import Recorded, make_job
from tests.live.served import serve, words
from tests.live.test_worker_process import eventually
from tests.live.test_workers import is_there, make_spec, pid_of

MEMORY = 80 * 2**20  # of Ray's object store, which nothing here uses
PATIENCE = PatienceSpec(start_s=120, silence_s=30, backoff_s=0.05, backoff_most_s=0.5)
BYTES = ByteTokenizer()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head without devices, and a node for each of two workers."""
    before = descendants(os.getpid())
    head = {"num_cpus": 0, "object_store_memory": MEMORY, "include_dashboard": False}
    found = Cluster(initialize_head=True, head_node_args=head)
    for name in ("left", "right"):
        add_node(found, name)
    ray.init(address=found.address, log_to_driver=False)
    yield found
    ray.shutdown()
    found.shutdown()
    assert eventually(lambda: descendants(os.getpid()) <= before), "Ray left processes behind"


def add_node(cluster: Cluster, resource: str) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=MEMORY, resources={resource: 1})


def parents() -> dict[int, int]:
    """The parent of every process that lives."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(path.parent.name)] = int(parent)
    return found


def descendants(pid: int) -> set[int]:
    known = parents()
    inside = {pid}
    while more := {child for child, parent in known.items() if parent in inside} - inside:
        inside |= more
    return inside - {pid}


@asynccontextmanager
async def running(
    node: str, spec: DeviceSpec, load: Load = stub_worker.load
) -> AsyncIterator[tuple[Workers, Recorded]]:
    needs = RayNeeds(num_cpus=1, num_gpus=0, resources={node: 1})
    tokenizers = dict.fromkeys(spec.models, BYTES)
    workers = Workers(node, spec, tokenizers, LaunchActor(needs, load), PATIENCE)
    events = Recorded()
    await workers.start(events)
    try:
        await workers.ready()
        yield workers, events
    finally:
        await workers.stop(5)


def node_of(pid: int) -> int:
    """The process of the node that started a worker."""
    known = parents()
    while "raylet" not in Path(f"/proc/{pid}/comm").read_text():
        pid = known[pid]
    return pid


def test_workers_run_on_the_nodes_that_have_their_devices_and_answer_as_here(
    cluster: Cluster, tmp_path: Path
) -> None:
    """A real engine on one node, a stub, which starts faster, on the other."""
    engine = EngineSpec(
        max_batch=4, token_budget=32, block_tokens=4, kv_tokens=640, dtype="float32", seed=0
    )
    source = tiny.write_config(tmp_path, "model", vocab_size=300)
    hosted = {"m0": HostedModel(source=source, engine=engine)}
    spec = DeviceSpec(device="cpu", threads=1, cores=None, models=hosted, drain_s=1)
    prompts = [BYTES.encode(text) for text in ("one", "and another", "x" * 50)]
    here = tiny.make_engine(source, kv_tokens=640, max_batch=4)
    expected = [BYTES.decode(tiny.generated(here, prompt, 8)) for prompt in prompts]

    async def scenario() -> None:
        async with (
            running("left", spec, load_engines) as left,
            running("right", make_spec("echo:0.001")) as right,
        ):
            assert node_of(pid_of(left[0])) != node_of(pid_of(right[0]))
            for workers, events in (left, right):
                for n, prompt in enumerate(prompts):
                    job = make_job(n, f"{workers.name}/m0", prompt, 8, ignore_eos=True)
                    workers.submit(job)
                await events.ended(0, 1, 2)
            assert [left[1].text[n] for n in range(3)] == expected
            assert [right[1].text[n] for n in range(3)] == ["oneoneon", "and anot", "x" * 8]

    asyncio.run(scenario())


def test_an_actor_that_is_killed_under_load_comes_back(cluster: Cluster) -> None:
    async def scenario() -> None:
        async with running("left", make_spec("echo:0.01")) as (workers, events):
            first = pid_of(workers)
            workers.submit(make_job(0, "left/m0", BYTES.encode("ab"), 900))
            await events.until(lambda: 0 in events.tokens)
            os.kill(first, signal.SIGKILL)
            await events.ended(0)
            assert events.ends[0].kind == "failed"
            await events.until(lambda: events.is_up("left/m0"), within_s=60)
            assert pid_of(workers) != first
            workers.submit(make_job(1, "left/m0", BYTES.encode("ab"), 3))
            await events.ended(1)
            assert events.text[1] == "aba"
            second = pid_of(workers)
        await gone(second)

    asyncio.run(scenario())


def test_a_setting_that_an_actor_refuses_reaches_the_gateway(cluster: Cluster) -> None:
    async def scenario() -> None:
        with pytest.raises(ValueError, match="a model that there is"):
            async with running("left", make_spec("refuse")):
                pass

    asyncio.run(scenario())


def test_a_worker_whose_node_is_removed_waits_for_another(cluster: Cluster) -> None:
    async def scenario() -> None:
        extra = add_node(cluster, "far")
        async with running("far", make_spec("echo:0.01")) as (workers, events):
            workers.submit(make_job(0, "far/m0", BYTES.encode("ab"), 900))
            await events.until(lambda: 0 in events.tokens)
            cluster.remove_node(extra, allow_graceful=False)
            await events.ended(0, within_s=60)
            assert events.ends[0].kind == "failed"
            assert not events.is_up("far/m0")
            add_node(cluster, "far")
            await events.until(lambda: events.is_up("far/m0"), within_s=60)

    asyncio.run(scenario())


def test_a_stranger_without_the_key_is_sent_away(cluster: Cluster) -> None:
    from multiprocessing import AuthenticationError
    from multiprocessing.connection import Client
    from socket import create_server

    from live.workers.actors import _accept

    async def scenario() -> None:
        with create_server(("127.0.0.1", 0)) as server:
            server.setblocking(False)
            address = server.getsockname()
            accepting = asyncio.create_task(_accept(server, b"right"))
            with pytest.raises((AuthenticationError, EOFError, OSError)):
                await asyncio.to_thread(Client, address, authkey=b"wrong")
            assert not accepting.done()
            with await asyncio.to_thread(Client, address, authkey=b"right") as connection:
                (await accepting).sendall(b"\0\0\0\2hi")
                assert connection.recv_bytes() == b"hi"

    asyncio.run(scenario())


def test_a_gateway_serves_from_an_actor_that_does_not_outlive_it(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    needs = "{num_cpus: 1, num_gpus: 0, resources: {left: 1}}"
    backend = f"backends=[{{kind: ray, name: far, needs: {needs}}}]"
    with serve(backend, "cluster.devices=1", "cluster.placement=[[opt-1m]]") as served:
        answer = served.complete(headers={"x-slo-e2e-ms": "60000"})
        assert answer.status_code == 200
        assert answer.headers["x-besteffort-replica"] == "far/opt-1m"
        assert len(actors()) == 1
        served.signal(signal.SIGKILL)
        assert eventually(lambda: not actors())


def actors() -> set[int]:
    """The processes of workers, as Ray names them."""
    known = descendants(os.getpid())
    return {pid for pid in known if any(b"RayWorker" in word for word in words(pid))}


async def gone(pid: int) -> None:
    async with asyncio.timeout(60):
        while is_there(pid):
            await asyncio.sleep(0.05)
