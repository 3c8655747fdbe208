"""The engine's steps, found in the times at which tokens came.

Under continuous batching every decoding request gets one token at the end of each step, so token k
of a request comes k steps after its first, and requests that run together share their steps: two
token series are aligned by one number, to which all their tokens testify. A step's work then
follows from the state of its requests, and its duration from how much later than in the step before
the tokens of the same requests came, where what the way to the client takes cancels out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
from jaxtyping import Float64

from calibrate.black_box.client import Answer
from calibrate.fit import StepTable

REACH = 4  # steps by which the tokens of one request may come late
COUNTED = 16  # a row counts as often as it was seen, but not more often


@dataclass(frozen=True)
class SeenStep:
    """One step as the tokens tell it; counts are those of rule 12 of `docs/simulation.md`."""

    decodes: int
    chunks: int
    prompt_tokens: int
    pairs: int
    kv_tokens: int
    done_tokens: int
    from_idle: bool  # timed from the sending of its request: its way there and back is in it
    step_s: float


@dataclass(frozen=True)
class Seen:
    """The steps of a cell."""

    steps: tuple[SeenStep, ...]  # those that can be told
    unlike: int  # with more prompt tokens than the token budget allows
    unclear: int  # whose begin, or whose prompts, cannot be told


def find_steps(
    answers: Sequence[Answer], max_batch: int, token_budget: int, overhead_s: float | None
) -> Seen:
    """The steps behind the answers of an engine that ran nothing else.

    Args:
        answers: All requests of a cell.
        max_batch: Requests that the engine runs at once.
        token_budget: Tokens that it computes in a step.
        overhead_s: Of a request's way to the server and of a token's way back; None: not known, so
            that nobody can tell which step began to compute a prompt that did not fit into one.
    """
    found, first = _align(answers)
    queue = sorted(range(len(answers)), key=lambda i: (answers[i].sent_s, i))
    completed: dict[int, list[int]] = {}
    for request in queue:
        completed.setdefault(first[request], []).append(request)
    done = [0] * len(answers)  # tokens of its prompt that earlier steps computed
    doubtful: set[int] = set()  # requests of which that is not clear
    steps, unlike, unclear = [], 0, 0
    for number, step in enumerate(found):
        decoding = [i for i in step if first[i] < number]
        prompts = completed.get(number, [])
        chunks = [(done[i], answers[i].prompt_tokens - done[i]) for i in prompts]
        left = token_budget - len(decoding) - sum(tokens for _, tokens in chunks)
        clear = doubtful.isdisjoint(prompts)
        split = next((i for i in queue if first[i] > number), None)
        # had all of its prompt fitted, its first token would have come with this step
        if (
            number and split is not None and len(step) < max_batch
            and 0 < left < answers[split].prompt_tokens - done[split]
        ):  # fmt: skip
            ago_s = min(found[number - 1].values()) - answers[split].sent_s
            was_there, sure = _arrived(ago_s, overhead_s)
            if not sure:
                doubtful.add(split)
            elif was_there:
                chunks.append((done[split], left))
                done[split] += left
            clear &= sure and split not in doubtful
        timed = _duration(found, number, prompts, answers)
        if clear and left < 0:
            unlike += 1
        elif not clear or timed is None:
            unclear += 1
        else:
            step_s, from_idle = timed
            steps.append(
                SeenStep(
                    decodes=len(decoding),
                    chunks=len(chunks),
                    prompt_tokens=sum(tokens for _, tokens in chunks),
                    pairs=sum(p * before + p * (p + 1) // 2 for before, p in chunks),
                    kv_tokens=sum(answers[i].prompt_tokens + number - first[i] for i in decoding),
                    done_tokens=sum(before for before, _ in chunks),
                    from_idle=from_idle,
                    step_s=step_s,
                )
            )
    return Seen(tuple(steps), unlike, unclear)


def step_table(cells: Sequence[Seen]) -> StepTable:
    """The steps of all cells as a table to fit: a group for each cell.

    Steps of a cell with the same requests and tokens are one row, of their means: rule 12 is linear
    in all else, and what delays one token and not the next cancels out. A row stands there as often
    as it was seen, `COUNTED` times at most. `switched` marks steps from idle, so that what the fit
    calls a switch is the way of a request to the server and of its token back.
    """
    rows = []
    for group, cell in enumerate(cells):
        alike: dict[tuple[int, int, int, bool], list[SeenStep]] = {}
        for step in cell.steps:
            kind = (step.decodes, step.chunks, step.prompt_tokens, step.from_idle)
            alike.setdefault(kind, []).append(step)
        for (decodes, chunks, prompt_tokens, from_idle), of_kind in alike.items():
            pairs, kv_tokens, done_tokens = (
                round(float(np.mean([getattr(step, name) for step in of_kind])))
                for name in ("pairs", "kv_tokens", "done_tokens")
            )
            step_s = float(np.mean([step.step_s for step in of_kind]))
            if step_s > 0:
                row = (
                    decodes + chunks, prompt_tokens, decodes + prompt_tokens, pairs, kv_tokens,
                    done_tokens, from_idle, step_s, group,
                )  # fmt: skip
                rows.extend([row] * min(len(of_kind), COUNTED))
    return StepTable(*(np.array(column) for column in zip(*rows, strict=True)))


def _align(answers: Sequence[Answer]) -> tuple[list[dict[int, float]], list[int]]:
    """When whose token came in each step, and the step in which each request's first token came."""
    found: list[dict[int, float]] = []
    first = [0] * len(answers)
    middles: list[float] = []
    for request in sorted(range(len(answers)), key=lambda i: answers[i].token_s[0]):
        times = np.array(answers[request].token_s)
        first[request] = begin = _first_step(np.array(middles), times)
        for number, at in enumerate(times.tolist(), begin):
            if number == len(found):
                found.append({})
                middles.append(at)
            found[number][request] = at
            middles[number] = median(found[number].values())
    return found, first


def _first_step(steps: Float64[np.ndarray, " S"], times: Float64[np.ndarray, " K"]) -> int:
    """The step of a request's first token: that for which its tokens lie nearest to the steps'.

    How long steps take differs, so the offset that is right is told even where all of a request's
    tokens come late.
    """
    count = len(steps)
    if count == 0 or times[0] > steps[-1] + np.median(np.diff(times)) / 2:
        return count  # after all steps so far
    nearest = int(np.searchsorted(steps, times[0]))
    options = range(max(nearest - REACH, 0), min(nearest + REACH, count - 1) + 1)

    def distance(begin: int) -> float:
        late = times[: count - begin] - steps[begin : begin + len(times)]
        middle = float(np.median(late))
        return float(np.abs(late - middle).mean()) + abs(middle)

    return min(options, key=distance)


def _arrived(ago_s: float, overhead_s: float | None) -> tuple[bool, bool]:
    """Whether a request that was sent so long before a step had arrived, and whether that is sure.

    Ways differ: what took less than half of the usual one was on its way, and what took half as
    long again had arrived.
    """
    if ago_s < 0:
        return False, True
    if overhead_s is None:
        return True, False
    return ago_s >= overhead_s, not 0.5 * overhead_s < ago_s < 1.5 * overhead_s


def _duration(
    found: Sequence[dict[int, float]],
    number: int,
    prompts: Sequence[int],
    answers: Sequence[Answer],
) -> tuple[float, bool] | None:  # fmt: skip
    """Seconds of a step, and whether it began as its request came; None if it is not clear."""
    step = found[number]
    if number:
        before = found[number - 1]
        later = [at - before[i] for i, at in step.items() if i in before]
        if later:
            return median(later), False
    if len(prompts) != 1:
        return None
    (alone,) = prompts
    if number and answers[alone].sent_s < min(found[number - 1].values()):
        return None  # it waited, or it was on its way: nobody can tell
    return step[alone] - answers[alone].sent_s, True
