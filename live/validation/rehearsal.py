"""What is found of the workers before anything is compared."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int

from agent.rule import Rule, least, load
from live.validation.play import Play, play
from live.validation.probe import probe
from live.validation.requests import Questions
from live.validation.scene import capacity, draw_scene
from live.validation.spec import ValidateSpec
from live.validation.steps import at_pace, gap_s, pace
from live.validation.watch import Watch
from sim.config import Spec, check
from sim.deploy import build_cluster
from sim.files import whole
from sim.observation import Array, Observation
from sim.profile import Bundle
from sim.ticks import to_ticks

LOOKS = 3  # at idle workers, before anything is played
ROUNDS = 3  # of the rehearsal; in the first, workers do much for the first time: it is not counted
REHEARSED = 1000  # added to the seed of what is played for the comparison


class Conditions(Spec):
    """What was found of the workers before anything was compared."""

    overhead_s: float  # around a lone step: from the gateway to the queue, and back
    gateway_s: float  # to observe, decide and send; median
    gap_s: float  # between the steps of a busy device; mean
    contention: float  # times as long a step takes where all devices are busy; of idle workers
    slowness: dict[str, float]  # by model, of the rehearsal: as of `Pace`
    prompt_s: dict[str, float]
    calibrated: bool  # here: gap and pace then went into the bundle


class OneByOne(Rule):
    """Sends all requests to one model, then all to the next, small to large, round after round."""

    name = "one_by_one"

    def __init__(self, duration_s: float) -> None:
        """`duration_s` is that of all rounds."""
        self._round = to_ticks(duration_s / ROUNDS)

    def choose(self, observation: Observation) -> Int[Array, ""]:
        """The least loaded replica of the model whose turn it is."""
        cluster = observation.cluster
        models = len(cluster.models)
        turn = observation.now_ticks % self._round * models // self._round
        own = cluster.replica_model == turn
        return least(observation, load(observation), observation.mask & own)


async def rehearse(
    spec: ValidateSpec, bundle: Bundle, watches: Sequence[Watch], questions: Questions,
    calibrated: bool,
) -> tuple[Conditions, Bundle]:  # fmt: skip
    """Look at the workers, and play a workload that is not compared, on one model after the other.

    The devices then hold the same model, as they do most of the time where load is high: how long a
    step takes depends on what the cores beside it do.

    Returns:
        What was found; and the bundle, with the time between steps and the speed that the workers
        had in the rehearsal, if it was `calibrated` here.
    """
    cluster = build_cluster(spec.cluster, bundle, spec.tasks.names)
    looks = [await probe(watches, cluster, bundle) for _ in range(LOOKS)]
    own = spec.model_copy(
        update={
            "workload": spec.workload.model_copy(update={"duration_s": spec.rehearsal.duration_s})
        }
    )
    rate = spec.rehearsal.load * capacity(spec, spec.cluster, bundle, questions)
    given = draw_scene(own, cluster, questions, spec.rehearsal.load, rate, spec.seed + REHEARSED)
    policy = OneByOne(spec.rehearsal.duration_s)
    wanted = Play(given.workload, given.bounds, given.questions, policy, policy.name, spec.seed)
    played = await play(watches, cluster, wanted)
    ended_s = played.steps.ended_s
    counted = played.steps.where(ended_s - ended_s[0] >= spec.rehearsal.duration_s / ROUNDS)
    between, own_pace = gap_s(counted, cluster), pace(counted, cluster, bundle)
    found = Conditions(
        overhead_s=float(np.median([look.overhead_s for look in looks])),
        gateway_s=float(np.median(played.columns["gateway_s"])),
        gap_s=looks[-1].gap_s if between is None else between,
        contention=float(np.median([look.contention for look in looks])),
        slowness={**own_pace.slowness},
        prompt_s={**own_pace.prompt_s},
        calibrated=calibrated,
    )
    if not calibrated:
        return found, bundle
    told = ", ".join(
        f"{model} {factor:.3f} (with a prompt {1e6 * found.prompt_s[model]:+.0f} µs)"
        for model, factor in found.slowness.items()
    )
    line = (
        f"step times times {told} and {1e6 * found.gap_s:.0f} µs more: in a rehearsal on the "
        "workers they were so much longer"
    )
    mended = at_pace(bundle, own_pace, found.gap_s)
    meta = mended.meta.model_copy(update={"sources": (*mended.meta.sources, line)})
    return found, replace(mended, meta=meta)


def save_conditions(found: Conditions, path: Path) -> None:
    """Write them, all of it or nothing."""
    with whole(path) as draft:
        draft.write_text(found.model_dump_json(indent=1) + "\n", "utf-8")


def load_conditions(path: Path) -> Conditions:
    """Read what `save_conditions` wrote."""
    return check(Conditions, json.loads(path.read_text("utf-8")), path.name)
