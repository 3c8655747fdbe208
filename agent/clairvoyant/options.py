"""The ways to serve each request: on which kind of device, by which model and how late."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from agent.clairvoyant.charges import Work, charges_of, kv_share, line_of
from sim.ticks import NEVER, TICKS_PER_S
from sim.types import Bounds, Cluster, Workload

TINY = 1e-12
LEVELS = 8  # of lateness, where bounds are soft


class Part(NamedTuple):
    """The prompt of each option, or its later tokens."""

    alone_s: Float64[np.ndarray, " O"]  # that it takes at the least
    charge_s: Float64[np.ndarray, " O"]
    rate: Float64[np.ndarray, " O"]  # most that is charged per second meanwhile


@dataclass(frozen=True)
class Options:
    """The variables: O ways to serve requests; times in seconds."""

    request: Int64[np.ndarray, " O"]
    kind: Int64[np.ndarray, " O"]
    model: Int64[np.ndarray, " O"]
    utility: Float64[np.ndarray, " O"]
    release_s: Float64[np.ndarray, " O"]
    due_s: Float64[np.ndarray, " O"]
    steps: Float64[np.ndarray, " O"]  # that it takes part in, and how long each is at the least
    step_s: Float64[np.ndarray, " O"]
    prefill: "Part"
    decode: "Part"
    line_prefill: "Part"  # what is charged beyond `Line.step_s` for each step
    line_decode: "Part"


def options_of(
    cluster: Cluster, workload: Workload, bounds: Bounds, kinds: list[dict[int, int]],
    together: int, miss_penalty: float,
) -> Options:  # fmt: skip
    """Every way to serve each request that is not impossible even alone."""
    arrival = workload.arrival_ticks / TICKS_PER_S
    release = arrival + cluster.overhead_ticks / TICKS_PER_S
    prompt = (workload.prompt_tokens - workload.cached_tokens).astype(float)
    context, output = workload.prompt_tokens.astype(float), workload.output_tokens.astype(float)
    need = workload.prompt_tokens + workload.max_tokens
    grace = bounds.grace_ticks / TICKS_PER_S
    levels = np.arange(1, LEVELS + 1) / LEVELS if grace > 0 else np.zeros(1)
    # a level stands for all that is less late: it earns what the earliest of it would
    earns = 1 - np.concatenate([[0.0], levels[:-1]]) if grace > 0 else np.ones(1)

    def limit(ticks: Int64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
        return np.where(ticks == NEVER, np.inf, ticks / TICKS_PER_S)

    e2e, ttft, tpot = map(limit, (bounds.e2e_ticks, bounds.ttft_ticks, bounds.tpot_ticks))
    work = Work(float(prompt.mean()), float(output.mean()))
    parts: list[tuple[np.ndarray, ...]] = []
    for kind, hosted in enumerate(kinds):
        for model, replica in hosted.items():
            charges = charges_of(cluster, replica, together, work)
            line_token_s = line_of(cluster, replica, together).token_s
            budget = int(cluster.token_budget[replica])
            chunks = np.ceil(prompt / budget)
            rest = (prompt - (chunks - 1) * budget).astype(int)
            fixed = charges.prompt_s + charges.sequence_s
            prefill = (chunks - 1) * (charges.step_s[budget] + fixed) + charges.step_s[rest] + fixed
            share = kv_share(cluster, replica, need, together)
            # contexts of the later steps: prompt + 1 to prompt + output − 1
            later = output - 1
            kv = share * charges.kv_token_s * later * (context + output / 2)
            longest = share * charges.kv_token_s * (context + output)
            decode = later * (charges.step_s[1] + charges.sequence_s)
            if share == 1.0:  # else some of these steps may read nothing
                decode += kv
            size = np.arange(1, budget + 1)
            parts_of = []
            for per_request, per_token in (
                (charges.request_s, charges.token_s),
                (line_token_s, line_token_s),
            ):
                part = per_request + charges.sequence_s
                of_chunk = (part + per_token * (size - 1)) / (charges.step_s[size] + fixed)
                most_of_chunk = np.maximum.accumulate(of_chunk)  # of chunks of up to so many tokens
                charged = later * part + kv
                rate = (part + longest) / (charges.step_s[1] + charges.sequence_s + longest)
                # all of it within the time that it takes at the least
                rate = np.maximum(rate, charged / np.maximum(decode, TINY))
                parts_of += [
                    prefill, part * chunks + per_token * (prompt - chunks),
                    most_of_chunk[np.minimum(prompt, budget).astype(int) - 1],
                    decode, charged, rate,
                ]  # fmt: skip
            shortest = np.full(len(workload), charges.step_s[1] + charges.sequence_s)
            fits = need <= cluster.max_context[replica]  # alone a model has all of the memory
            overhead = cluster.overhead_ticks / TICKS_PER_S
            quality = cluster.quality[model, workload.task]
            for level, factor in zip(levels * grace, earns, strict=True):
                in_time = fits & (overhead + prefill <= ttft + level)
                in_time &= overhead + prefill + decode <= e2e + level
                in_time &= decode <= (tpot + level) * np.maximum(later, 1)
                (who,) = np.nonzero(in_time & (quality * factor > miss_penalty))
                columns = (
                    quality * factor, release, arrival + e2e + level, chunks + later, shortest,
                    *parts_of,
                )  # fmt: skip
                numbers = (np.full(len(who), kind), np.full(len(who), model))
                parts.append((who, *numbers, *(column[who] for column in columns)))
    if not parts:
        parts = [(*[np.zeros(0, np.int64)] * 3, *[np.zeros(0)] * 17)]
    found = [np.concatenate(column) for column in zip(*parts, strict=True)]
    who, of_kind, of_model, utility, released, due, steps, step_s = found[:8]
    prompt_part, later_part, *beyond = (Part(*found[at : at + 3]) for at in range(8, 20, 3))
    return Options(
        who, of_kind, of_model, utility, released, due, steps, step_s, prompt_part, later_part,
        *beyond,
    )  # fmt: skip
