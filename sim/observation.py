"""What a router knows when it decides: one schema for both engines, every policy and the gateway.

Raw signals are integers that a live router can count; whatever is derived from them is computed
here, in the array namespace of the signals (NumPy or jax.numpy), in integer ticks wherever it is
a time. Nothing here depends on the output length of a request that has not finished (rule 15).

R replicas, T tasks, S time scales.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from sim.ticks import NEVER, TICKS_PER_S
from sim.types import PAIR_SHIFT, Cluster

# Raised with every change of what is observed or derived: trained routers are tied to it.
OBSERVATION_SCHEMA = 4

WINDOW_BITS = (38, 40, 42, 44, 46)  # arrivals are counted over windows of 2^bits ticks
WINDOWS_S = tuple(2.0 ** (bits - 40) for bits in WINDOW_BITS)  # 0.25, 1, 4, 16 and 64 s
_WINDOW_TICKS = 1 << np.array(WINDOW_BITS)

# Arrays are NumPy's in the SimPy engine and the gateway, and JAX's in the JAX engine.
Array = Any


@dataclass(frozen=True, eq=False)
class Observation:
    """One request at the router, and the system it meets.

    Replica signals are those of now, or of the latest snapshot plus what was sent since. Arrays
    are valid during the decision only; a policy that keeps one copies it.
    """

    cluster: Cluster
    now_ticks: Int[Array, ""]

    # the request
    task: Int[Array, ""]
    prompt_tokens: Int[Array, ""]
    max_tokens: Int[Array, ""]
    e2e_slack_ticks: Int[Array, ""]  # from now to its bound on the last token; NEVER if none
    ttft_slack_ticks: Int[Array, ""]  # from now to its bound on the first token; NEVER if none
    tpot_ticks: Int[Array, ""]  # its bound per token after the first; NEVER if none
    grace_ticks: Int[Array, ""]  # 0 if bounds are hard
    random_bits: Int[Array, ""]  # 32 bits drawn from (seed, request index), for random policies

    # the replicas
    running: Int[Array, " R"]  # requests in the batch, the partly prefilled one included
    decoding: Int[Array, " R"]  # those of them that emit a token in each step
    waiting: Int[Array, " R"]  # requests in the queue
    prefill_tokens: Int[Array, " R"]  # prompt tokens still to be computed, queue included
    decode_tokens: Int[Array, " R"]  # most tokens that may still be emitted, queue included
    kv_tokens: Int[Array, " R"]  # context of the decoding requests
    kv_blocks_used: Int[Array, " R"]
    mask: Bool[Array, " R"]  # replicas that would take the request

    # the stream of arrivals, this request included
    window_arrivals: Int[Array, "S T"]  # in the current window of each scale
    previous_arrivals: Int[Array, "S T"]  # in the window before it
    since_arrival_ticks: Int[Array, ""]  # since the arrival before this one

    # what came back
    finished_requests: Int[Array, " T"]
    finished_tokens: Int[Array, " T"]  # emitted by them

    @cached_property
    def xp(self) -> ModuleType:
        """The array namespace of this observation: numpy or jax.numpy."""
        namespace: ModuleType = self.running.__array_namespace__()
        return namespace

    @cached_property
    def quality(self) -> Float[Array, " R"]:
        """Quality of each replica's model on the request's task."""
        return self.cluster.quality[self.cluster.replica_model, self.task]

    @cached_property
    def inside(self) -> Int[Array, " R"]:
        """Requests inside each replica, running or waiting."""
        return self.running + self.waiting

    @cached_property
    def arrival_rate_rps(self) -> Float[Array, "S T"]:
        """Estimated arrivals per second of each task at each time scale.

        The window before counts with the share of it that a window ending now still covers. Until
        a scale has passed since time 0, its estimate is over the time since, the shortest window
        at least.
        """
        xp, length = self.xp, _WINDOW_TICKS
        covered = (self.now_ticks & (length - 1)) / length
        since_start = xp.maximum(self.now_ticks, length[0])
        seconds = xp.minimum(length, since_start) / TICKS_PER_S
        seen = self.window_arrivals + (1.0 - covered)[:, None] * self.previous_arrivals
        return seen / seconds[:, None]

    @cached_property
    def expected_output_tokens(self) -> Int[Array, ""]:
        """Mean output of finished requests of the task, with max_tokens as the first datum."""
        tokens = self.finished_tokens[self.task] + self.max_tokens
        mean = tokens // (self.finished_requests[self.task] + 1)
        return self.xp.minimum(self.xp.maximum(mean, 1), self.max_tokens)

    @cached_property
    def predicted_round_ticks(self) -> Int[Array, " R"]:
        """Time between two decode steps of a replica once this request decodes in it.

        One decode step of the replica with the request in its batch, the prompts of those to come
        beside it, and one of each other replica on its device that has work: they take turns.
        """
        xp, cluster = self.xp, self.cluster
        own = self._decode_ticks(
            xp.minimum(self.decoding + 1, cluster.max_batch), self.kv_tokens + self.prompt_tokens
        )
        return own + self._others_ticks + self._prompts_ticks

    @cached_property
    def predicted_ttft_ticks(self) -> Int[Array, " R"]:
        """Predicted time from now to the first token on each replica.

        Steps until the batch has room, at the rate at which requests of the expected length leave;
        then the prefill of all that is ahead and of this prompt in chunks of what the token budget
        leaves; the other replicas of the device have their turn in between.
        """
        xp, cluster = self.xp, self.cluster
        chunk = xp.maximum(cluster.token_budget - self.decoding, 1)
        ahead = self.prefill_tokens + self.prompt_tokens
        full_steps, rest = (ahead - 1) // chunk, (ahead - 1) % chunk + 1
        full = self._prefill_ticks(chunk) + self._others_ticks
        last = self._prefill_ticks(rest) + self._others_ticks
        pairs = self.prompt_tokens * (self.prompt_tokens + 1) // 2
        pair_ticks = (cluster.coefficients.pair_ticks_scaled * pairs) >> PAIR_SHIFT
        return self._slot_wait_ticks + full_steps * full + last + pair_ticks

    @cached_property
    def predicted_finish_ticks(self) -> Int[Array, " R"]:
        """Predicted time from now to the last token on each replica, at the expected length."""
        later_tokens = self.expected_output_tokens - 1
        return self.predicted_ttft_ticks + later_tokens * self.predicted_round_ticks

    @cached_property
    def predicted_service_ticks(self) -> Int[Array, " R"]:
        """Predicted time on each replica from its first prompt token to its last, no waiting."""
        later_tokens = self.expected_output_tokens - 1
        prefill = self._prefill_ticks(self.prompt_tokens)
        return prefill + self._others_ticks + later_tokens * self.predicted_round_ticks

    @property
    def added_ticks(self) -> Int[Array, " R"]:
        """Predicted time that the request takes away from the others on each replica's device.

        That of the step that computes its prompt, and by how much it lengthens the later ones,
        which are there for it alone where the replica has nothing else to do.
        """
        xp = self.xp
        now = self._decode_ticks(self.decoding, self.kv_tokens) * (self.inside > 0)
        then = self._decode_ticks(
            xp.minimum(self.decoding + 1, self.cluster.max_batch),
            self.kv_tokens + self.prompt_tokens,
        )
        later_tokens = self.expected_output_tokens - 1
        prompt = self._prefill_ticks(self.prompt_tokens) - now
        return xp.maximum(prompt, 0) + later_tokens * xp.maximum(then - now, 0)

    @cached_property
    def capacity_rps(self) -> Float[Array, " R"]:
        """Requests like this one that each replica could finish per second, alone on its device.

        A full batch decodes at the mean context of such requests, and each prompt takes its share
        of a full prefill step.
        """
        xp, cluster = self.xp, self.cluster
        output = self.expected_output_tokens
        in_cache = cluster.kv_blocks * cluster.block_tokens // (self.prompt_tokens + output)
        batch = xp.minimum(xp.maximum(in_cache, 1), cluster.max_batch)
        decode = self._decode_ticks(batch, batch * (self.prompt_tokens + output // 2))
        cost, budget = cluster.coefficients, cluster.token_budget
        prefill = cost.host_ticks + cluster.tokens_ticks[cluster.replica_model, budget]
        prefill = prefill + cost.sequence_ticks + cost.prompt_ticks
        ticks = output * decode / batch + self.prompt_tokens * prefill / budget
        return TICKS_PER_S / ticks

    @cached_property
    def predicted_on_time(self) -> Bool[Array, " R"]:
        """Whether each replica is predicted to meet every bound of the request."""
        tpot_met = self.predicted_round_ticks <= self.tpot_ticks
        ttft_met = self.predicted_ttft_ticks <= self.ttft_slack_ticks
        return tpot_met & ttft_met & (self.predicted_finish_ticks <= self.e2e_slack_ticks)

    @cached_property
    def _slot_wait_ticks(self) -> Int[Array, " R"]:
        """Time until each replica's batch has room for the request.

        As many run at once as it has slots, and as its KV memory holds of the requests inside.
        """
        xp, cluster, output = self.xp, self.cluster, self.expected_output_tokens
        context = self.kv_tokens + self.prefill_tokens + self.prompt_tokens + output
        each = xp.maximum(context // (self.inside + 1), 1)
        in_cache = cluster.kv_blocks * cluster.block_tokens // each
        batch = xp.minimum(xp.maximum(in_cache, 1), cluster.max_batch)
        slot_rounds = xp.maximum(self.inside + 1 - batch, 0) * output // batch
        return slot_rounds * self.predicted_round_ticks

    @cached_property
    def _prompts_ticks(self) -> Int[Array, " R"]:
        """What a decode step of each replica takes longer for the prompts of those to come.

        Whoever leaves is followed by a request like this one, so that each step computes the share
        of a prompt that one of so many decoding requests stands for, in chunks of what they leave
        of the token budget.
        """
        xp, cluster = self.xp, self.cluster
        decoding = xp.minimum(self.decoding + 1, cluster.max_batch)
        room = xp.maximum(cluster.token_budget - decoding, 1)
        chunk = xp.minimum(self.prompt_tokens, room)
        more = self._tokens_ticks(decoding + chunk) - self._tokens_ticks(decoding)
        prompt = (
            xp.maximum(more, 0) * self.prompt_tokens // chunk + cluster.coefficients.prompt_ticks
        )
        return decoding * prompt // self.expected_output_tokens

    @property
    def longer_wait_ticks(self) -> Int[Array, " R"]:
        """Half of the time until each replica's batch has room.

        Which is how much longer a request at the end of a queue should expect to wait: at exactly
        the predicted wait a long queue settles where all miss a little.
        """
        return self._slot_wait_ticks >> 1

    @property
    def earning(self) -> Bool[Array, " R"]:
        """Whether the request is predicted to be of use to anybody from each replica.

        It is where no bound is missed by the grace or more, should it wait half as long again for
        room.
        """
        most = self.grace_ticks + (self.grace_ticks == 0)  # lateness below it earns something
        more = self.longer_wait_ticks
        last = self.predicted_finish_ticks + more - self.e2e_slack_ticks < most
        first = self.predicted_ttft_ticks + more - self.ttft_slack_ticks < most
        return last & first & (self.predicted_round_ticks - self.tpot_ticks < most)

    def without_late(self) -> "Observation":
        """The observation with replicas masked that would only be kept busy for nothing (rule 5).

        A device that has nothing to do takes the request all the same: it keeps nobody waiting, and
        predictions that are too slow are found out.
        """
        idle = self.cluster.same_device @ self.inside == 0
        masked = replace(self, mask=self.mask & (self.earning | idle))
        vars(masked).update({name: part for name, part in vars(self).items() if name != "mask"})
        return masked

    @cached_property
    def _others_ticks(self) -> Int[Array, " R"]:
        """One decode step of each other replica with work on the same device.

        And where there is one, the switches of a round, to them and back.
        """
        switch = self.cluster.coefficients.switch_ticks
        step = self._decode_ticks(self.decoding, self.kv_tokens) + switch
        step = step * (self.inside > 0)
        others = self.cluster.same_device @ step - step
        return others + switch * (others > 0)

    def _decode_ticks(self, decoding: Int[Array, " R"], kv_tokens: Int[Array, " R"]) -> Array:
        """Duration of a step of each replica in which only so many decode (rule 12)."""
        cost = self.cluster.coefficients
        fixed = cost.host_ticks + cost.sequence_ticks * decoding + cost.kv_token_ticks * kv_tokens
        return fixed + self._tokens_ticks(decoding)

    def _prefill_ticks(self, chunk: Int[Array, " R"]) -> Array:
        """Duration of a step of each replica with a chunk beside those that decode now.

        Without what attention of the chunk takes (rule 12).
        """
        return self._beside_chunk_ticks + self._tokens_ticks(self.decoding + chunk)

    @cached_property
    def _beside_chunk_ticks(self) -> Int[Array, " R"]:
        """What of a step with a chunk does not depend on its length."""
        cost = self.cluster.coefficients
        return (
            cost.host_ticks
            + cost.sequence_ticks * (self.decoding + 1)
            + cost.kv_token_ticks * self.kv_tokens
            + cost.prompt_ticks
        )

    def _tokens_ticks(self, tokens: Int[Array, " R"]) -> Array:
        """What a step of each replica takes by its tokens, as many as the table has at the most."""
        table = self.cluster.tokens_ticks
        return table[self.cluster.replica_model, self.xp.minimum(tokens, table.shape[1] - 1)]


def fits_alone(
    cluster: Cluster, prompt_tokens: Int[Array, ""], max_tokens: Int[Array, ""]
) -> Bool[Array, " R"]:
    """Whether each replica could hold the request if it were empty: not `too_long` (rule 6)."""
    need = prompt_tokens + max_tokens
    if cluster.scheduler == "transformers_fifo":  # rounds up generously
        blocks = need // cluster.block_tokens + 1
    else:
        blocks = -(-need // cluster.block_tokens)
    return (need <= cluster.max_context) & (blocks <= cluster.kv_blocks)


def idle(cluster: Cluster, xp: ModuleType) -> Observation:
    """The observation of a first request at an idle cluster: what shapes and types there are."""
    nothing = xp.zeros(cluster.n_replicas, dtype=xp.int64)
    n_tasks = len(cluster.tasks)
    counts = xp.zeros((len(WINDOW_BITS), n_tasks), dtype=xp.int64)
    zero, one, never = xp.int64(0), xp.int64(1), xp.int64(NEVER)
    return Observation(
        cluster=cluster,
        now_ticks=zero,
        task=zero,
        prompt_tokens=one,
        max_tokens=one,
        e2e_slack_ticks=never,
        ttft_slack_ticks=never,
        tpot_ticks=never,
        grace_ticks=zero,
        random_bits=zero,
        running=nothing,
        decoding=nothing,
        waiting=nothing,
        prefill_tokens=nothing,
        decode_tokens=nothing,
        kv_tokens=nothing,
        kv_blocks_used=nothing,
        mask=xp.ones(cluster.n_replicas, dtype=bool),
        window_arrivals=counts,
        previous_arrivals=counts,
        since_arrival_ticks=zero,
        finished_requests=xp.zeros(n_tasks, dtype=xp.int64),
        finished_tokens=xp.zeros(n_tasks, dtype=xp.int64),
    )
