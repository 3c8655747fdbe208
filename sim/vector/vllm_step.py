"""What happens to the batch and the queue of a replica of vLLM's, on the rows of that replica.

Nothing here writes to the state: rows come in, rows and the records of those who leave go out.
Rows over all slots are few, and what is done to them is a handful of reductions; everything else
is known of at most `TOGETHER` requests that something happens to in one pass. Where it happens to
more of them at one instant, another pass follows at the same instant.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Int64

from sim.ticks import NEVER
from sim.types import Outcome
from sim.vector.batch import Batch, Forming, Limits, blocks_of, death_of, records_of, work_of
from sim.vector.rows import running_total, total
from sim.vector.state import (
    CONTEXT,
    DEATH,
    DUE,
    EMITTED,
    F_CACHED,
    F_MAX,
    F_OUTPUT,
    F_PROMPT,
    FIRST_AT,
    LARGEST,
    NO_CONTEXT,
    NOW,
    ORDER,
    VACANT,
    Replica,
)

WINDOW = 2  # waiting requests that one scan looks at; a longer scan goes on at the same instant
TOGETHER = 2  # requests that one pass lets emit a token that is not just the next, or die


class Facts(NamedTuple):
    """What is known of n requests."""

    ids: Int32[Array, " n"]
    facts: Int32[Array, "n 4"]
    deaths: Int64[Array, "n 2"]
    records: Int64[Array, "n 4"]
    grace: Int64[Array, ""]

    @property
    def prompt(self) -> Int32[Array, " n"]:
        """Prompt tokens of each."""
        return self.facts[:, F_PROMPT]

    @property
    def whole(self) -> Int32[Array, " n"]:
        """The most tokens that its context may reach."""
        return self.facts[:, F_PROMPT] + self.facts[:, F_MAX]

    @property
    def emitted(self) -> Int32[Array, " n"]:
        """Tokens emitted before it was last admitted; less the decode count, if it decodes."""
        return self.records[:, EMITTED].astype(jnp.int32)


class Members(NamedTuple):
    """n requests of the batch of one replica; what is not `there` is meaningless."""

    slot: Int32[Array, " n"]
    there: Bool[Array, " n"]
    rows: Int32[Array, "n 4"]
    death: Int64[Array, " n"]
    facts: Facts


class Changes(NamedTuple):
    """What becomes of n members; a record is written where `told`."""

    rows: Int32[Array, "n 4"]
    death: Int64[Array, " n"]
    leaves: Bool[Array, " n"]
    told: Bool[Array, " n"]
    records: Int64[Array, "n 4"]


class Admitted(NamedTuple):
    """What a scan does with the W requests at the head of the queue."""

    admitted: Bool[Array, " W"]
    slot: Int32[Array, " W"]
    rows: Int32[Array, "W 4"]
    death: Int64[Array, " W"]
    dropped: Bool[Array, " W"]
    records: Int64[Array, "W 4"]  # of the dropped


def held_blocks(
    limits: Limits, replica: Replica, context: Int32[Array, " B"], count: Int32[Array, ""]
) -> Int32[Array, ""]:
    """KV blocks that a batch holds, after `count` decode steps, before the next."""
    computed = jnp.where(context > NO_CONTEXT, context + count - 1, 0)
    grown = total(blocks_of(computed, limits.block_tokens))
    return replica.blocks + jnp.where(limits.reserve, 0, grown)


def first_of(mask: Bool[Array, " B"], n: int) -> Int32[Array, " n"]:
    """The first n slots for which the mask holds; B beyond the last of them."""
    slot = jnp.arange(mask.shape[0], dtype=jnp.int32)
    found = [jnp.int32(-1)]
    for _ in range(n):
        later = mask & (slot > found[-1])
        found.append(jnp.min(jnp.where(later, slot, mask.shape[0])))
    return jnp.stack(found[1:])


def due(batch: Batch) -> Int32[Array, " n"]:
    """Slots of requests that finish now, or whose prompt is computed; as many as one pass takes."""
    return first_of(batch.slots[DUE] <= batch.replica.decode_count, TOGETHER)


def emit(
    limits: Limits, batch: Batch, members: Members, now: Int64[Array, ""]
) -> tuple[Replica, Changes, Bool[Array, ""]]:
    """Requests finish, and prompts that are computed emit a token (rule 13).

    The members are `due`, the decode count is up to date. Also returns whether others are due.
    """
    replica, count, block = batch.replica, batch.replica.decode_count, limits.block_tokens
    there, facts = members.there, members.facts
    prefilled = there & (members.rows[:, DUE] == NOW)
    ended = there & ~prefilled
    emitted = facts.emitted + jnp.where(prefilled, 1, count)
    unused = facts.facts[:, F_MAX] - emitted
    left = facts.facts[:, F_OUTPUT] - emitted
    finished = there & (left == 0)
    starts = there & ~finished
    context = facts.prompt + emitted

    first = prefilled & (facts.records[:, FIRST_AT] < 0)
    first_at = jnp.where(first, now, facts.records[:, FIRST_AT])
    death = death_of(facts.grace, facts.deaths, first_at)
    going = jnp.stack([facts.ids, left + count, context - count, members.rows[:, ORDER]], axis=1)
    rows = jnp.where(starts[:, None], going, jnp.asarray(VACANT, jnp.int32))

    held = blocks_of(context - 1, block)
    computed = jnp.where(prefilled, held, 0)
    reserved = jnp.where(finished, blocks_of(facts.whole, block), 0)
    replica = replica._replace(
        running=replica.running - total(finished),
        decoding=replica.decoding + total(starts) - total(ended),
        kv_tokens=replica.kv_tokens
        + total(jnp.where(starts, context, 0) - jnp.where(ended, context, 0)),
        decode_tokens=replica.decode_tokens - total(prefilled + jnp.where(finished, unused, 0)),
        prefill_tokens=replica.prefill_tokens - replica.step_prefill,
        step_prefill=jnp.zeros_like(replica.step_prefill),
        blocks=replica.blocks - total(jnp.where(limits.reserve, reserved, computed)),
        freed=replica.freed + total(jnp.where(finished, held, 0)),
    )
    left_at = jnp.where(finished, now, -1)
    outcome = jnp.where(finished, int(Outcome.FINISHED), int(Outcome.INSIDE))
    so_far = jnp.where(finished, emitted, emitted - count)
    record = records_of(left_at, first_at, outcome, so_far)
    changes = Changes(rows, jnp.where(starts, death, NEVER), finished, there, record)
    return replica, changes, total(batch.slots[DUE] <= count) > TOGETHER


def at_risk(
    batch: Batch, now: Int64[Array, ""], cancel: Bool[Array, ""]
) -> tuple[Int32[Array, " n"], Bool[Array, " B"]]:
    """Slots of requests that are dead, as many as one pass takes, then of the latest admitted.

    The latest that is alive: it is the one to be preempted, and if a prompt is split, that one.
    Also returns which are dead, however many they are.
    """
    dead = (batch.times[DEATH] <= now) & cancel
    order = jnp.where(dead, -1, batch.slots[ORDER])
    latest = first_of((order == jnp.max(order)) & (order >= 0), 1)
    return jnp.concatenate([first_of(dead, TOGETHER), latest]), dead


def begin(
    limits: Limits, batch: Batch, members: Members, dead: Bool[Array, " B"],
    now: Int64[Array, ""], on: Bool[Array, ""],
) -> tuple[Replica, Changes, Forming, Bool[Array, ""], Int32[Array, ""]]:  # fmt: skip
    """The dead leave, decodes take their blocks, the split prompt its chunk (rules 7, 9, 10).

    The members are those `at_risk`. At most one request is preempted: the last of the members.
    Also returns whether another pass is needed before the queue is scanned, and the blocks that
    are then free for it. Nothing happens unless `on`.
    """
    replica, slots = batch.replica, batch.slots
    count, block = replica.decode_count, limits.block_tokens
    facts = members.facts
    last = jnp.arange(members.slot.shape[0]) == TOGETHER
    there = members.there & on
    gone = there & ~last
    more_dead = on & (total(dead) > TOGETHER)
    decodes = there & (members.rows[:, CONTEXT] > NO_CONTEXT)
    partial = there & (members.slot + 1 == replica.partial)
    left = jnp.where(partial, replica.left, 0)
    emitted = facts.emitted + jnp.where(decodes, count, 0)
    context = facts.prompt + emitted
    whole = blocks_of(facts.whole, block)
    computed = context - jnp.where(partial, left, 1)
    held = blocks_of(computed, block)
    fixed = jnp.where(partial, held, 0)
    fixed = jnp.where(limits.reserve, jnp.where(there, whole, 0), fixed)

    # once the dead have left and the decodes have taken theirs
    contexts = jnp.where(dead & on, NO_CONTEXT, slots[CONTEXT])
    alive = replica._replace(blocks=replica.blocks - total(jnp.where(gone, fixed, 0)))
    free = limits.kv_blocks - held_blocks(limits, alive, contexts, count + 1)
    goes_on = on & ~more_dead
    short = goes_on & (free < 0)

    # the split prompt
    decoding = replica.decoding - total(gone & decodes)
    budget = limits.token_budget - decoding
    chunk = jnp.where(partial, jnp.minimum(budget, left), 0)
    grown = jnp.where(limits.reserve, whole, blocks_of(context - left + chunk, block))
    tried = partial & last & goes_on & ~short
    takes = tried & (grown - fixed <= free)
    back = last & there & (short | (tried & ~takes))
    tokens = total(jnp.where(takes, chunk, 0))
    work = jnp.where(takes, work_of(chunk, context - left), 0)
    free -= total(jnp.where(takes, grown - fixed, 0))

    leaves = gone | back
    again = jnp.where(back, context - facts.facts[:, F_CACHED], 0)
    unused = jnp.where(gone, facts.facts[:, F_MAX] - emitted, 0)
    done = takes & (chunk == left)
    rows = members.rows.at[:, DUE].set(jnp.where(done, NOW, members.rows[:, DUE]))
    rows = jnp.where(leaves[:, None], jnp.asarray(VACANT, jnp.int32), rows)
    preempts = back[-1]
    full = blocks_of(computed[-1] + 1 - block, block)  # rounded down
    was_split = jnp.any(partial & (leaves | done))
    replica = replica._replace(
        running=replica.running - total(leaves),
        decoding=decoding - total(back & decodes),
        kv_tokens=replica.kv_tokens - total(jnp.where(decodes & leaves, context, 0)),
        prefill_tokens=replica.prefill_tokens + total(again - jnp.where(leaves, left, 0)),
        decode_tokens=replica.decode_tokens - total(unused),
        step_prefill=jnp.where(on, tokens, replica.step_prefill),
        partial=jnp.where(was_split, 0, replica.partial),
        left=jnp.where(was_split, 0, replica.left - tokens),
        blocks=replica.blocks
        + total(jnp.where(takes, grown - fixed, 0) - jnp.where(leaves, fixed, 0)),
        kept=jnp.where(preempts, jnp.where(limits.prefix_caching, full, 0), replica.kept),
        freed=jnp.where(preempts, 0, replica.freed + total(jnp.where(gone, held, 0))),
        head=replica.head - preempts,
        waiting=replica.waiting + preempts,
    )
    outcome = jnp.where(gone, int(Outcome.CANCELLED), int(Outcome.INSIDE))
    record = records_of(jnp.where(gone, now, -1), facts.records[:, FIRST_AT], outcome, emitted)
    death = jnp.where(leaves, NEVER, members.death)
    changes = Changes(rows, death, leaves, leaves, record)
    # a step that preempted admits nobody
    budget = jnp.where(preempts, -1, budget - tokens)
    forming = Forming(budget, jnp.sum(work), replica.running)
    return replica, changes, forming, more_dead | short, free


def scan(
    limits: Limits, replica: Replica, forming: Forming, heads: Facts, free: Int32[Array, ""],
    spare: Int32[Array, " W"], now: Int64[Array, ""], cancel: Bool[Array, ""],
) -> tuple[Replica, Admitted, Forming, Bool[Array, ""], Int64[Array, ""]]:  # fmt: skip
    """Admit from the head of the queue to the spare slots (rule 11).

    The head may find blocks again (rule 7): those that are free and were not freed since it was
    preempted. Also returns whether the scan is over, and then the death of who heads the queue now.
    """
    budget, emitted, first_at = forming.budget, heads.emitted, heads.records[:, FIRST_AT]
    there = (jnp.arange(WINDOW, dtype=jnp.int32) < replica.waiting) & (budget >= 0)
    death = death_of(heads.grace, heads.deaths, first_at)
    dead = there & cancel & (death <= now)
    alive = there & ~dead
    context = heads.prompt + emitted
    found = jnp.clip(free - replica.freed, 0, replica.kept)
    found = jnp.where(jnp.arange(WINDOW) == 0, found, 0)
    done = jnp.maximum(heads.facts[:, F_CACHED], found * limits.block_tokens)
    left = context - done
    asked = jnp.where(alive, left, 0)
    chunk = jnp.clip(budget - running_total(asked) + asked, 0, left)
    most = jnp.where(limits.reserve, heads.whole, context)
    whole = blocks_of(most, limits.block_tokens)
    blocks = jnp.where(limits.reserve, whole, blocks_of(done + chunk, limits.block_tokens))
    earlier = running_total(alive) - alive
    fits = (chunk > 0) & (replica.running + earlier < limits.max_batch)
    fits &= running_total(jnp.where(alive, whole, 0)) <= free
    stops = running_total(~(there & (dead | fits)))
    passes = stops == 0
    admitted, dropped = passes & alive, passes & dead
    over = ~passes[-1] | (replica.waiting == WINDOW)

    slot = spare[earlier]
    split = admitted & (chunk < left)
    rows = jnp.stack(
        [
            heads.ids, jnp.where(split, LARGEST, NOW), jnp.full_like(slot, NO_CONTEXT),
            earlier + replica.admissions,
        ],
        axis=1,
    )  # fmt: skip

    # who heads the queue now
    ahead = jnp.argmax(stops > 0)
    there_is = (stops[-1] > 0) & (ahead < replica.waiting)
    head_death = jnp.where(there_is, death[ahead], NEVER)

    tokens = total(jnp.where(admitted, chunk, 0))
    work = jnp.where(admitted, work_of(chunk, done), 0)
    unused = jnp.where(dropped, heads.facts[:, F_MAX] - emitted, 0)
    spared = done - heads.facts[:, F_CACHED]
    settled = jnp.where(passes, spared + jnp.where(dead, left, 0), 0)
    gone = total(passes)
    replica = replica._replace(
        running=replica.running + total(admitted),
        prefill_tokens=replica.prefill_tokens - total(settled),
        decode_tokens=replica.decode_tokens - total(unused),
        step_prefill=replica.step_prefill + tokens,
        admissions=replica.admissions + total(admitted),
        partial=jnp.max(jnp.where(split, slot + 1, replica.partial)),
        left=jnp.max(jnp.where(split, left - chunk, replica.left)),
        blocks=replica.blocks + total(jnp.where(admitted, blocks, 0)),
        kept=jnp.where(passes[0], 0, replica.kept),
        head=replica.head + gone,
        waiting=replica.waiting - gone,
    )
    record = records_of(now, first_at, int(Outcome.CANCELLED), emitted)
    return (
        replica,
        Admitted(admitted, slot, rows, death, dropped, record),
        # whoever runs takes part
        Forming(budget - tokens, forming.work + jnp.sum(work), replica.running),
        over,
        head_death,
    )


def put(batch: Batch, members: Members, changes: Changes) -> Batch:
    """The rows with what has become of some members."""
    slots, times = batch.slots, batch.times
    slot = jnp.arange(slots.shape[1])
    for i in range(members.slot.shape[0]):
        here = slot == members.slot[i]
        slots = jnp.where(here, changes.rows[i][:, None], slots)
        times = jnp.where(here, changes.death[i], times)
    return batch._replace(slots=slots, times=times)


def refresh(limits: Limits, batch: Batch) -> tuple[Replica, Int64[Array, ""]]:
    """What others need to know of the slots to leap without looking at them; next death too."""
    replica, slots, times = batch
    count = replica.decode_count
    free = limits.kv_blocks - held_blocks(limits, replica, slots[CONTEXT], count)
    # in block_tokens steps every decoding request needs one block
    cycles = jnp.minimum(free // jnp.maximum(replica.decoding, 1), 1 << 20)
    safe = jnp.where(limits.reserve, 1 << 30, cycles * limits.block_tokens)
    replica = replica._replace(next_end=jnp.min(slots[DUE]), safe_until=count + safe)
    return replica, jnp.min(times[DEATH])
