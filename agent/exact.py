"""The best possible policy of a small system, by value iteration over the simulator's own replicas.

Time is cut into slots in each of which a request arrives or not, and every step ends with a slot.
So all that can be is a finite number of states, found by letting the replicas of `sim.vllm` go on
from each state under each action. Nothing of the simulator's rules is written down again here.

S states, K tasks, A actions: the replicas, and as the last to shed.
"""

import pickle
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int, Int32, Int64

from sim.cluster import take_turn
from sim.config import ConfigError
from sim.observation import Array, Observation
from sim.policy import SHED
from sim.replica import Request, Step
from sim.types import Cluster, Outcome
from sim.vllm import VllmReplica

MOST_STATES = 1_000_000
Key = tuple[object, ...]


@dataclass(frozen=True)
class Kind:
    """The requests of a task, all alike."""

    chance: float  # that one arrives in a slot
    prompt_tokens: int
    output_tokens: int
    bound_slots: int  # to the last token, hard


@dataclass(frozen=True, eq=False)
class Small:
    """A system to be solved: a kind for each task of the cluster."""

    cluster: Cluster
    slot_ticks: int
    kinds: tuple[Kind, ...]

    def __post_init__(self) -> None:
        """Refuse what has other states than those that are told apart.

        Raises:
            ConfigError: with what is allowed.
        """
        cluster = self.cluster
        if len(self.kinds) != len(cluster.tasks):
            raise ConfigError("kinds", len(self.kinds), f"one for each of {cluster.tasks}")
        if not 0 < sum(kind.chance for kind in self.kinds) < 1:
            raise ConfigError("kinds", [k.chance for k in self.kinds], "chances of less than 1")
        for replica in range(cluster.n_replicas):
            block = int(cluster.block_tokens[replica])
            most = max(-(-(k.prompt_tokens + k.output_tokens) // block) for k in self.kinds)
            most *= int(cluster.max_batch[replica])
            if not cluster.alive[replica] or cluster.kv_blocks[replica] < most:
                raise ConfigError(
                    "cluster.kv_blocks", int(cluster.kv_blocks[replica]),
                    f"at least {most}, which a full batch takes, on replicas that are alive",
                )  # fmt: skip
        for name, value, allowed in (
            ("scheduler", cluster.scheduler, "vllm"),
            ("overhead_ticks", cluster.overhead_ticks, 0),
            ("signal_period_ticks", cluster.signal_period_ticks, 0),
            ("cancel_expired", cluster.cancel_expired, True),
            ("shed_late", cluster.shed_late, False),
        ):
            if value != allowed:
                raise ConfigError(f"cluster.{name}", value, f"must be {allowed}")


@dataclass(frozen=True, eq=False)
class Solution:
    """Every state, what follows, and what is best in each."""

    small: Small
    idle: Int32[np.ndarray, " S"]  # the state one slot later, if nobody arrives
    after: Int32[np.ndarray, "S K A"]  # and if one arrives and the action is taken
    action: Int32[np.ndarray, "S K"]  # the best
    per_request: float  # utility of the best policy in the long run

    @cached_property
    def _leaps(self) -> list[Int32[np.ndarray, " S"]]:
        """The state 1, 2, 4, … slots later, nobody arriving, until nothing changes any more."""
        leaps = [self.idle]
        while not np.array_equal(leaps[-1][leaps[-1]], leaps[-1]):
            leaps.append(leaps[-1][leaps[-1]])
        return leaps

    def later(self, xp: Array, state: Int[Array, ""], slots: Int[Array, ""]) -> Int[Array, ""]:
        """The state so many slots later, nobody arriving; `xp` is the array namespace."""
        for bit, leap in enumerate(self._leaps):
            state = xp.where((slots >> bit) & 1 > 0, xp.asarray(leap)[state], state)
        beyond = slots >= 1 << len(self._leaps)
        return xp.where(beyond, xp.asarray(self._leaps[-1])[state], state)


class _World:
    """The system at the moment of an arrival: steps that end now have ended."""

    def __init__(self, small: Small) -> None:
        self.small, self.cluster = small, small.cluster
        self.now, self.count, self.earned = 0, 0, 0.0
        self.model = 0  # of the step that ends
        cluster = self.cluster
        self.replicas = [VllmReplica(cluster, r, True, self) for r in range(cluster.n_replicas)]
        self.devices = [
            _Device([r for r in self.replicas if r.device == d]) for d in range(cluster.n_devices)
        ]

    def __call__(self, request: Request, outcome: Outcome) -> None:
        """A request leaves."""
        if outcome == Outcome.FINISHED and self.now <= request.last_death:
            self.earned += float(self.cluster.quality[self.model, request.task])

    def route(self, task: int, replica: int) -> bool:
        """Send a request there; whether it was taken."""
        kind, small = self.small.kinds[task], self.small
        own = self.replicas[replica]
        if own.refusal(kind.prompt_tokens, kind.output_tokens) is not None:
            return False
        death = self.now + kind.bound_slots * small.slot_ticks
        prompt, output = kind.prompt_tokens, kind.output_tokens
        own.enqueue(Request(self.count, task, prompt, output, output, 0, death, death))
        self.count += 1
        return True

    def slot(self) -> float:
        """Go on to the end of the slot: what was earned."""
        end, self.earned = self.now + self.small.slot_ticks, 0.0
        while self.now < end:
            for device in self.devices:
                if device.step is None:
                    device.form_step(self.now)
            due = [d for d in self.devices if d.step is not None]
            self.now = min([end, *(d.until for d in due)])
            for device in due:
                if device.until == self.now:
                    assert device.step is not None
                    self.model = device.step.replica.model
                    device.step.replica.end_step(device.step, self.now)
                    device.step = None
        return self.earned

    def key(self) -> Key:
        """What the future depends on, whatever the time."""
        return tuple(device.key(self.now) for device in self.devices)


@dataclass
class _Device:
    """A device whose steps end with a slot."""

    replicas: list[VllmReplica]
    last: int | None = None
    step: Step | None = None
    until: int = 0

    def form_step(self, now: int) -> None:
        """Begin the step of the replica whose turn it is, if there is one."""
        self.last, self.step = take_turn(self.replicas, self.last, now)
        if self.step is not None:
            self.until = now + self.step.ticks

    def key(self, now: int) -> Key:
        """What the device's future depends on."""
        step: Key = ()
        if self.step is not None:
            chunks = [(request.index, tokens) for request, tokens in self.step.chunks]
            place = {index: n for n, index in enumerate(self.step.replica.running)}
            step = (
                [r is self.step.replica for r in self.replicas].index(True),
                self.until - now, self.step.decodes,
                tuple((place[index], tokens) for index, tokens in chunks),
            )  # fmt: skip
        inside = [
            (
                len(replica.running),
                *(
                    (r.task, replica.emitted(r), r.prefill_left, r.death - now)
                    for r in (*replica.running.values(), *replica.queue)
                ),
            )
            for replica in self.replicas
        ]
        return self.last, step, *inside


def solve(small: Small, tolerance: float = 1e-9) -> Solution:
    """Find all states, and the policy that earns most per request in the long run.

    Relative value iteration on slots (Puterman, "Markov decision processes", 1994, ch. 8.5); the
    chain is aperiodic, as the empty system follows itself.

    Raises:
        ConfigError: if there are more than `MOST_STATES` states.
    """
    idle, after, gain, gains = _explore(small)
    chance = np.array([kind.chance for kind in small.kinds])
    values = np.zeros(len(idle))
    while True:
        asked = gains + values[after]  # [S, K, A]
        following = (1 - chance.sum()) * (gain + values[idle]) + asked.max(axis=2) @ chance
        change = following - values
        values = following - following[0]
        if change.max() - change.min() < tolerance:
            break
    per_slot = float(change.max() + change.min()) / 2
    action = asked.argmax(axis=2).astype(np.int32)
    return Solution(small, idle, after, action, per_slot / float(chance.sum()))


def _explore(
    small: Small,
) -> tuple[
    Int32[np.ndarray, " S"], Int32[np.ndarray, "S K A"],
    Float64[np.ndarray, " S"], Float64[np.ndarray, "S K A"],
]:  # fmt: skip
    """Every state that can be reached from the empty system, and what is earned on the way."""
    start = _World(small)
    known: dict[Key, int] = {start.key(): 0}
    kept = [pickle.dumps(start)]
    actions = [*range(small.cluster.n_replicas), SHED]
    idle: list[int] = []
    gain: list[float] = []
    after: list[list[list[int]]] = []
    gains: list[list[list[float]]] = []

    def goes_on(state: bytes, task: int, action: int) -> tuple[int, float]:
        world: _World = pickle.loads(state)
        taken = action == SHED or world.route(task, action)
        earned = world.slot()
        key = world.key()
        if key not in known:
            if len(known) == MOST_STATES:
                raise ConfigError("small", len(known), "fewer states")
            known[key] = len(known)
            kept.append(pickle.dumps(world))
        return known[key], earned if taken else -np.inf  # a refusal is never better than to shed

    while len(idle) < len(kept):
        state, kept[len(idle)] = kept[len(idle)], b""
        found, earned = goes_on(state, 0, SHED)
        rows = [[goes_on(state, task, a) for a in actions] for task in range(len(small.kinds))]
        idle.append(found)
        gain.append(earned)
        after.append([[follows for follows, _ in row] for row in rows])
        gains.append([[got for _, got in row] for row in rows])
    return np.array(idle, np.int32), np.array(after, np.int32), np.array(gain), np.array(gains)


class Place(NamedTuple):
    """Where the system is."""

    state: Int32[Array, ""]  # at the end of the slot of the latest arrival
    slot: Int64[Array, ""]  # of that arrival; −1 before the first


@dataclass(frozen=True, eq=False)
class Exact:
    """The best policy, which knows the state because it follows it from the beginning."""

    solution: Solution
    name = "exact"

    def hosted(self, models: tuple[str, ...]) -> tuple[str, ...]:
        """All of the models on offer."""
        return models

    def init(self, cluster: Cluster) -> Place:
        """The empty system.

        Raises:
            ConfigError: if it is another system than the one that was solved.
        """
        if cluster.n_replicas != self.solution.small.cluster.n_replicas:
            allowed = f"the {self.solution.small.cluster.n_replicas} that were solved for"
            raise ConfigError("cluster.n_replicas", cluster.n_replicas, allowed)
        return Place(np.int32(0), np.int64(-1))

    def decide(self, state: Place, observation: Observation) -> tuple[Int[Array, ""], Place]:
        """The best action in the state that has been reached."""
        xp, found = observation.xp, self.solution
        now = observation.now_ticks // found.small.slot_ticks
        here = found.later(xp, state.state, now - state.slot - 1)
        action = xp.asarray(found.action)[here, observation.task]
        follows = xp.asarray(found.after)[here, observation.task, action]
        choice = xp.where(action < observation.cluster.n_replicas, action, SHED)
        return choice, Place(xp.asarray(follows, dtype=xp.int32), xp.asarray(now, dtype=xp.int64))
