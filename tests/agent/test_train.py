"""Training: reproducible, resumable to the bit, and it stops where it should."""

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hydra import compose, initialize_config_module
from jax.experimental.compilation_cache import compilation_cache
from omegaconf import OmegaConf
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event

from agent import checkpoint, tensors
from agent.train import finish, go
from agent.trainer import STATE, Trainer, bands
from agent.training import TrainSpec, make_ground, make_loop, train, validation_of
from sim.config import ConfigError, check

SMALL = [
    "name=tiny", "seeds=2", "pool=3", "validation=4", "assess_every=2", "save_every=1",
    "cluster.devices=1", "cluster.models=[opt-125m,opt-1.3b]", "cluster.max_batch=8",
    "cluster.max_queue=16", "workload=practice", "workload.duration_s=4",
    "workload.arrivals.low_rps=40",
    "agent.architecture.widths=[8]", "agent.architecture.hold_s=0.05",
    "agent.practice.clusters=2", "agent.practice.requests=40", "agent.dqn.iterations=4",
    "agent.dqn.updates=3", "agent.dqn.batch_size=8", "agent.dqn.capacity=50",
]  # fmt: skip
TINY = [
    *SMALL, "agent.practice.moments=2", "agent.practice.branches=2",
    "agent.practice.forced_s=[0.1,0.1]", "agent.practice.horizon_s=0.3",
]  # fmt: skip
PLAYED = [
    *SMALL, "agent=plans_played", "agent.architecture.plans=[{shares: [0,1]},{shares: [1,0]}]",
    "agent.practice.decisions=20",
]  # fmt: skip
QUIET = Console(quiet=True)


@pytest.fixture(scope="module", autouse=True)
def settings(tmp_path_factory) -> Iterator[Path]:
    """The Hydra tree, and a folder in which compiled programs are kept for other processes."""
    cache = tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_compilation_cache_dir", str(cache))
    compilation_cache.reset_cache()
    with initialize_config_module("conf", version_base="1.3"):
        yield cache
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def make_spec(
    *overrides: str, folder: Path = Path("unused"), base: Sequence[str] = TINY
) -> TrainSpec:
    config = compose("train", overrides=[*base, f"output_dir={folder}", *overrides])
    return check(TrainSpec, OmegaConf.to_container(config, resolve=True), "")


def content(trainer: Trainer) -> dict[str, bytes]:
    """All of a training but the time that it took."""
    arrays = tensors.flat(trainer.run)
    return {name: array.tobytes() for name, array in arrays.items() if name != "seconds"}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory) -> Trainer:
    """A training that has been through all of its iterations."""
    trainer = Trainer(make_spec(folder=tmp_path_factory.mktemp("training")))
    go(trainer, QUIET)
    return trainer


@pytest.fixture(scope="module")
def finished(trainer: Trainer) -> dict[str, bytes]:
    return content(trainer)


@pytest.fixture
def anew(trainer: Trainer, finished: dict[str, bytes], tmp_path: Path) -> Iterator[Trainer]:
    """The same trainer at the start, in a folder of its own; afterwards it has finished again."""
    spec = trainer.spec
    trainer.spec = spec.model_copy(update={"output_dir": str(tmp_path)})
    trainer.run = trainer.start()
    yield trainer
    trainer.spec = spec
    assert trainer.resume()
    assert content(trainer) == finished


def test_a_training_goes_on_from_its_state_to_the_same_bits(anew, finished):
    anew.step()
    anew.step()
    anew.save()
    anew.run = anew.start()
    assert anew.resume()
    assert anew.iteration == 2
    go(anew, QUIET)
    assert content(anew) == finished


@pytest.mark.slow
def test_a_training_that_was_killed_comes_to_the_same_bits(anew, finished, settings):
    folder = Path(anew.spec.output_dir)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # inherited: it is to have as many devices as here, one
    try:
        killed = subprocess.Popen(
            [sys.executable, "-m", "agent.train", *TINY, f"output_dir={folder}"],
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(settings)},
            stdout=subprocess.DEVNULL,
        )
    finally:
        os.sched_setaffinity(0, cores)
    while not (folder / STATE).is_file():
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert anew.resume()
    assert anew.iteration > 0
    go(anew, QUIET)
    assert content(anew) == finished


def test_the_state_of_other_settings_is_refused_by_name(trainer):
    own = trainer.spec
    dqn = own.agent.dqn.model_copy(update={"updates": 7})
    trainer.spec = own.model_copy(update={"agent": own.agent.model_copy(update={"dqn": dqn})})
    try:
        with pytest.raises(ConfigError, match=r"agent.dqn.updates = 7: .* has 3; resume=false"):
            trainer.resume()
    finally:
        trainer.spec = own


def test_a_training_starts_anew_where_its_state_is_not_wanted(anew):
    anew.step()
    anew.save()
    anew.spec = anew.spec.model_copy(update={"resume": False})
    assert not anew.resume()
    assert not Path(anew.spec.output_dir, STATE).exists()


def test_the_best_weights_in_validation_are_kept_those_before_any_learning_included(anew):
    had = {0: tensors.flat(anew.run.learner.target)}
    while not anew.finished:
        anew.step()
        had[anew.iteration] = tensors.flat(anew.run.learner.target)
    assert anew.run.assessed_at.tolist() == [0, 2, 4]
    performance = anew.run.validation.mean(axis=2)  # [K, S]
    which, seed = np.unravel_index(performance.argmax(), performance.shape)
    kept = anew.checkpoint("")
    assert kept.spec.performance == performance.max()
    best = had[int(anew.run.assessed_at[which])]
    assert kept.weights.keys() == best.keys()
    assert all((kept.weights[name] == best[name][seed]).all() for name in best)


@pytest.mark.parametrize(("base", "kept"), [(TINY, "target"), (PLAYED, "params")])
def test_of_comparisons_an_average_is_kept_and_of_what_is_played_the_latest_weights(base, kept):
    spec = make_spec(base=base)
    loop = make_loop(make_ground(spec), spec)
    learner = loop.start(jax.random.key(0))
    assert loop.kept(learner._replace(params="params", target="target")) == kept


def test_seeds_come_to_different_routers(trainer):
    for leaf in jax.tree.leaves(trainer.run.learner.params):
        if leaf[0].size > 2:  # comparisons leave alone what is added to both parts of all choices
            assert bool((leaf[0] != leaf[1]).any())
    assert (trainer.run.practice["loss"][:, 0] != trainer.run.practice["loss"][:, 1]).all()


@pytest.mark.slow
def test_training_is_a_function_of_a_key_and_the_same_beside_other_seeds(trainer):
    pure = partial(train, config=trainer.spec)
    learner, metrics = jax.jit(pure)(jax.random.key(1))
    for name, values in metrics.items():
        assert np.asarray(values) == pytest.approx(trainer.run.practice[name][:, 1], rel=1e-4)
    beside = jax.tree.map(lambda leaf: leaf[1], trainer.run.learner.params)
    assert jax.tree.all(jax.tree.map(partial(jnp.allclose, rtol=1e-4, atol=1e-6),
                                     learner.params, beside))  # fmt: skip


def test_a_router_learns_from_what_is_played_too():
    spec = make_spec("agent.dqn.iterations=2", base=PLAYED)
    quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    learner, metrics = quick(partial(train, config=spec))(jax.random.key(0))
    start = make_loop(make_ground(spec), spec).start(jax.random.key(0))
    changed = jax.tree.map(lambda a, b: (a != b).any(), learner.params, start.params)
    assert jax.tree.all(changed)
    assert (metrics["requests"] == 2 * 40).all()
    assert (metrics["decisions"] > 4).all()
    assert metrics["remembered"].tolist() == np.cumsum(metrics["decisions"]).clip(max=50).tolist()


def test_a_training_that_diverges_stops_and_keeps_the_weights_from_before(anew):
    start = tensors.flat(anew.run.learner.params)
    anew.step()
    before = tensors.flat(anew.run.learner.params)
    target = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.inf), anew.run.learner.target)
    anew.run = anew.run._replace(learner=anew.run.learner._replace(target=target))
    go(anew, QUIET)
    assert anew.finished
    assert anew.iteration == 2
    assert anew.diverged == [1]
    after = tensors.flat(anew.run.learner.params)
    assert all((after[name][1] == before[name][1]).all() for name in before)
    complaint = finish(anew, "", QUIET)
    assert complaint is not None
    assert "diverged at iteration 2 (seed 1)" in complaint
    assert "resume=false or another name starts anew" in complaint
    # of the weights that were assessed, as those of iteration 1 were not
    assert anew.run.assessed_at.tolist() == [0, -1, -1]
    kept = checkpoint.load(str(Path(anew.spec.output_dir, "checkpoint")))
    assert kept.spec.iteration == 0
    assert kept.spec.performance == anew.run.validation[0, kept.spec.seed].mean()
    assert all((kept.weights[name] == start[name][kept.spec.seed]).all() for name in start)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_is_asked_to_stop_saves_where_it_is(anew, monkeypatch, number):
    before = signal.getsignal(number)
    anew.spec = anew.spec.model_copy(update={"save_every": 100})
    step = anew.step

    def interrupted():
        os.kill(os.getpid(), number)
        return step()

    monkeypatch.setattr(anew, "step", interrupted)
    go(anew, QUIET)
    assert signal.getsignal(number) == before
    assert anew.iteration == 1
    complaint = finish(anew, "", QUIET)
    assert complaint == "stopped at iteration 1: the same command goes on"
    anew.run = anew.start()
    assert anew.resume()
    assert anew.iteration == 1


def events(folder: Path) -> Iterator[tuple[str, int]]:
    """Names and steps of the points in a folder, by TensorBoard's record format."""
    for file in sorted(folder.glob("events.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            for value in Event.FromString(data[12 : 12 + length]).summary.value:
                yield value.tag, Event.FromString(data[12 : 12 + length]).step
            data = data[16 + length :]


def test_tensorboard_is_told_of_practice_and_validation_apart(trainer):
    for seed in (0, 1):
        told = list(events(Path(trainer.spec.output_dir, "tensorboard", f"seed{seed}")))
        assert [step for name, step in told if name == "train/performance"] == [1, 2, 3, 4]
        assert [step for name, step in told if name == "validation/performance"] == [2, 4]


def test_a_training_ends_in_a_checkpoint_a_report_and_a_table(anew, trainer):
    go(anew, QUIET)
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    assert finish(anew, "python -m agent.train", console) is None
    folder, text = Path(anew.spec.output_dir), console.export_text()
    kept = checkpoint.load(str(folder / "checkpoint"))
    assert f"{100 * kept.spec.performance:.1f}" in text
    assert f"best at iteration {kept.spec.iteration} of 4" in text
    assert str(folder / "checkpoint") in text
    page = (folder / "report.html").read_text("utf-8")
    assert page.count("<svg") == 2
    assert "analytic profile</span>" in page
    assert f"{kept.spec.performance:.1%} of peak" in page


def test_bands_are_of_workloads_of_similar_rate():
    ground = make_ground(make_spec())
    requests = validation_of(make_spec("validation=8"), ground.cluster)
    told = bands(requests, np.arange(8.0))
    assert [band.workloads for band in told] == [2, 2, 2, 2]
    assert sum(band.performance for band in told) / 4 == pytest.approx(3.5)
    assert all(a.high_rps <= b.low_rps for a, b in pairwise(told))


def test_validation_is_on_other_requests_than_practice():
    ground = make_ground(make_spec())
    validation = validation_of(make_spec(), ground.cluster)
    arrivals = {row.tobytes() for row in np.asarray(ground.pool.arrival)}
    assert not arrivals & {row.tobytes() for row in np.asarray(validation.arrival)}


@pytest.mark.parametrize("agent", ["plans", "plans_played", "gears", "paper", "replicas"])
def test_every_agent_that_is_shipped_is_complete(agent):
    config = compose("train", overrides=[f"agent={agent}", "name=x", "pool=1"])
    spec = check(TrainSpec, OmegaConf.to_container(config, resolve=True), "")
    assert make_ground(spec).architecture.name == agent.removesuffix("_played")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+speed=1", "speed = 1: unknown key; allowed: agent"),
        ("seeds=0", "seeds = 0: "),
        ("assess_every=0", "assess_every = 0: "),
        ("agent.dqn.learning_rate=-1", "agent.dqn.learning_rate = -1: "),
        ("+agent.dqn.rate=1", "agent.dqn.rate = 1: unknown key; allowed: batch_size"),
        ("agent.practice.stretch=[2,1]", "agent.practice.stretch = .*stretch must go"),
        ("agent.architecture.hold_s=-1", "agent.architecture = .*hold_s = -1"),
        ("agent.architecture._target_=agent.architectures.Oracle", "agent.architecture = .*Oracle"),
        (
            "agent.architecture._target_=pathlib.Path",
            "agent.architecture._target_ = .*has no schema",
        ),
        ("reward.kind=fame", "reward.kind = 'fame'"),
        ("cluster.models=[opt-13b]", "opt-13b"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(override, message):
    with pytest.raises(ConfigError, match=message):
        make_ground(make_spec(override))


def test_more_random_choices_than_there_are_decisions_are_refused():
    with pytest.raises(ConfigError, match=r"agent.* dqn.epsilon must be ≤ 1, a share .*, got 4"):
        make_spec("agent.dqn.epsilon=4", base=PLAYED)
    assert make_spec("agent.dqn.epsilon=4").agent.dqn.epsilon == 4  # there it is noise in value


def test_choices_that_are_valued_together_can_be_compared_for_single_requests():
    sizes = [text for text in TINY[1:] if not text.startswith("agent.architecture")]
    spec = make_spec(
        "agent=replicas_compared", *(text for text in sizes if "forced_s" not in text),
        "agent.architecture.embedding=[8]", "agent.architecture.widths=[8]", base=["name=x"],
    )  # fmt: skip
    loop = make_loop(make_ground(spec), spec)
    before = jax.jit(loop.start)(jax.random.key(0))
    after, metrics = jax.jit(loop.iterate)(before)
    assert np.isfinite(metrics["loss"])
    assert metrics["loss"] > 0
    assert metrics["decisions"] > 0
    old, new = before.params, after.params
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool(jnp.any(a != b)), old, new)))


def test_a_workload_of_one_draw_alone_is_refused():
    config = compose("train", overrides=["name=x", "workload=saved", "workload.path=x"])
    with pytest.raises(ConfigError, match=r"workload.kind must not be saved"):
        check(TrainSpec, OmegaConf.to_container(config, resolve=True), "")


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["agent.practice.branches=3"], "agent.practice.branches", 3),
        (["agent.practice.forced_s=[0.01,0.2]"], "agent.practice.forced_s", [0.01, 0.2]),
        (["agent.practice.forced_s=[3,9]", "agent.practice.horizon_s=8"], "agent.practice", None),
    ],
)
def test_what_cannot_be_compared_is_refused(overrides, key, value):
    def make() -> None:
        spec = make_spec(*overrides)
        make_loop(make_ground(spec), spec)

    with pytest.raises(ConfigError) as refused:
        make()
    assert key in str(refused.value)
    assert value is None or repr(value) in str(refused.value)
