"""The device at hand in each cluster of a batch, and the replicas whose slots are worked on.

Work on slots is costly and few clusters need it at any event, so it is done for a list of items,
each of them a replica of one of the clusters. C clusters, P items.
"""

from dataclasses import replace
from typing import NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32, Int64

from sim.types import Cluster
from sim.vector.batch import Batch, Limits, limits_of
from sim.vector.device import Site
from sim.vector.rows import read, read_row, rows_of, write
from sim.vector.state import Device, Replica, State

Tree = TypeVar("Tree")


class Sites(NamedTuple):
    """The device at hand in each of C clusters."""

    clusters: Cluster
    table: Int32[Array, "D K"]
    lanes: Int32[Array, " C"]
    device_index: Int32[Array, " C"]

    def device(self, state: State) -> Device:
        """Its row."""
        return Device(*jnp.moveaxis(read(state.devices, (self.lanes, self.device_index)), -1, 0))

    def set_device(self, state: State, device: Device) -> State:
        """The state with its row changed."""
        row = jnp.stack(device, axis=-1)
        return replace(state, devices=state.devices.at[self.lanes, self.device_index].set(row))

    def where(self, state: State) -> Site:
        """Its replicas."""
        replicas = self.table[self.device_index]
        at = (self.lanes[:, None], replicas)
        return Site(replicas, rows_of(read(state.ledger, at)), read(state.next_death, at))

    def item(self, state: State, device: Device, lane: Int32[Array, " P"]) -> "Items":
        """The chosen replica of the device, in the clusters `lane`."""
        at = jnp.minimum(lane, self.lanes.shape[0] - 1)
        row = cast(Device, jax.tree.map(lambda column: column[at], device))
        index = self.device_index[at]
        r = self.table[index, row.chosen]
        limits = limits_of(self.clusters, (at, r))
        batch = Batch(
            rows_of(read(state.ledger, (at, r))),
            read_row(state.slots, at, r),
            read_row(state.times, at, r),
        )
        return Items(lane, at, lane < self.lanes.shape[0], index, row, r, limits, batch)


class Items(NamedTuple):
    """P replicas whose slots are worked on; `lane` is out of bounds where there is none."""

    lane: Int32[Array, " P"]
    at: Int32[Array, " P"]  # as `lane`, within bounds
    on: Bool[Array, " P"]
    device_index: Int32[Array, " P"]
    device: Device
    r: Int32[Array, " P"]
    limits: Limits
    batch: Batch

    def tell(
        self, state: State, ids: Int32[Array, "P n"], records: Int64[Array, "P n 4"],
        told: Bool[Array, "P n"],
    ) -> State:  # fmt: skip
        """The state with the records of some requests."""
        on = told & self.on[:, None]
        return replace(state, record=write(state.record, (self.lane[:, None], ids), records, on))

    def set_row(self, state: State, row: Replica) -> State:
        """The state with other rows of the items' replicas in the ledger."""
        columns = jnp.stack(row, axis=-1)
        return replace(state, ledger=state.ledger.at[self.lane, self.r].set(columns, mode="drop"))

    def advance(self, device: Device, **columns: Int64[Array, " P"]) -> Device:
        """The devices at hand of all clusters, with columns of those of the items changed."""
        old = device._asdict()
        new = {name: old[name].at[self.lane].set(columns[name], mode="drop") for name in columns}
        return device._replace(**new)


def where(on: Bool[Array, " P"], new: Tree, old: Tree) -> Tree:
    """`new` where `on`, else `old`, over the leading axis of trees."""

    def one(a: Array, b: Array) -> Array:
        return jnp.where(on.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return cast(Tree, jax.tree.map(one, new, old))
