"""One replica of the oracle: a queue, a batch, and the two schedulers said directly."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from sim.types import Cluster, Outcome


@dataclass(eq=False)
class Request:
    """One request and all that has happened to it."""

    index: int
    arrival: int
    task: int
    prompt: int
    output: int
    max_tokens: int
    cached: int
    e2e: int
    ttft: int
    grace: int
    computed: int  # tokens whose keys and values are there, or will be when it is admitted
    computing: int = 0  # tokens that the step under way adds
    decoding: bool = False
    blocks: int = 0  # held, under the scheduler of transformers
    held: list[int] = field(default_factory=list)  # blocks by name, under that of vLLM
    kept: int = 0  # of them were full when it was last preempted
    replica: int = -1
    outcome: int = Outcome.INSIDE
    left: int = -1
    first_token: int = -1
    emitted: int = 0
    preemptions: int = 0

    def rest(self) -> int:
        """Tokens still to be computed before it decodes (rules 7 and 13)."""
        return 0 if self.decoding else self.prompt + self.emitted - self.computed

    def dead(self, now: int) -> bool:
        """Rule 17."""
        if self.first_token < 0:
            return now >= self.arrival + min(self.ttft, self.e2e) + self.grace
        lateness = max(0, self.first_token - self.arrival - self.ttft)
        worthless = lateness >= self.grace if self.grace else lateness > 0
        return worthless or now >= self.arrival + self.e2e + self.grace


Chunk = tuple[Request, int]  # a request and how many of its tokens are computed


class Replica:
    """A queue and a batch, both plain lists; `seen` counts what happens to them."""

    def __init__(self, cluster: Cluster, number: int, seen: Counter[str]) -> None:
        self.number = number
        self.seen = seen
        self.transformers = cluster.scheduler == "transformers_fifo"
        self.cancel_expired = cluster.cancel_expired
        self.max_context = int(cluster.max_context[number])
        self.max_queue = int(cluster.max_queue[number])
        self.max_batch = int(cluster.max_batch[number])
        self.budget = int(cluster.token_budget[number])
        self.block_tokens = int(cluster.block_tokens[number])
        self.capacity = int(cluster.kv_blocks[number])
        self.reserve = bool(cluster.reserve[number])
        self.prefix_caching = bool(cluster.prefix_caching[number])
        self.waiting: list[Request] = []
        self.running: list[Request] = []  # in the order they were admitted
        self.admits = True  # transformers: false after a reset
        self.free = list(range(self.capacity))  # vLLM: blocks that nobody holds, the next first
        self.content: dict[int, tuple[Request, int]] = {}  # vLLM: whose n-th block it was

    def blocks(self, request: Request, more: int = 0) -> int:
        """Blocks of a running request once it has computed `more` tokens."""
        if self.transformers:
            return request.blocks
        tokens = request.computed + request.computing + more
        if self.reserve:
            tokens = request.prompt + request.max_tokens
        return -(-tokens // self.block_tokens)

    def used(self, step: Sequence[Chunk] = ()) -> int:
        """Blocks in use with those that a step takes."""
        more = dict(step)
        return sum(self.blocks(request, more.get(request, 0)) for request in self.running)

    def too_long(self, request: Request) -> bool:
        """Whether a request could not be held even alone (rule 6)."""
        tokens = request.prompt + request.max_tokens
        blocks = -(-tokens // self.block_tokens)
        if self.transformers:
            blocks = tokens // self.block_tokens + 1
        return tokens > self.max_context or blocks > self.capacity

    def leave(self, request: Request, outcome: Outcome, now: int) -> None:
        """Take a request out for good."""
        (self.running if request in self.running else self.waiting).remove(request)
        self.release(request)
        request.outcome, request.left = outcome, now

    def evict(self, request: Request) -> None:
        """Take a request's slot and blocks; it has to be computed again."""
        self.running.remove(request)
        if self.prefix_caching:
            full = request.held[: request.computed // self.block_tokens]
            self.content |= {block: (request, n) for n, block in enumerate(full)}
            request.kept = len(full)
        self.release(request)
        request.computed, request.decoding, request.blocks = request.cached, False, 0
        request.preemptions += 1

    def cancelled(self, request: Request, now: int) -> bool:
        """Whether a request is dead and has left for that (rules 9 and 11)."""
        if not self.cancel_expired or not request.dead(now):
            return False
        state = "decoding" if request.decoding else "prefilling"
        self.seen[f"cancelled {'waiting' if request in self.waiting else state}"] += 1
        self.leave(request, Outcome.CANCELLED, now)
        return True

    def release(self, request: Request) -> None:
        """Free a request's blocks, the last of them first."""
        self.free += reversed(request.held)
        request.held = []

    def hold(self, request: Request, more: int) -> None:
        """Let a request hold the blocks it needs once it has computed `more` tokens."""
        while len(request.held) < self.blocks(request, more):
            block = self.free.pop(0)
            self.content.pop(block, None)
            request.held.append(block)

    def find_again(self, request: Request) -> None:
        """Let a waiting request hold those of its leading blocks that keep its content."""
        mine = {n: b for b, (owner, n) in self.content.items() if owner is request}
        while (n := len(request.held)) in mine:
            self.free.remove(mine[n])
            request.held.append(mine[n])
        found = len(request.held)
        request.computed = max(request.computed, found * self.block_tokens)
        # whoever was preempted earlier has nothing left: what was free then has been taken
        assert not {o.index for o, _ in self.content.values()} & {r.index for r in self.waiting[1:]}
        self.seen["found all blocks again"] += 0 < found == request.kept
        self.seen["found some blocks again"] += 0 < found < request.kept
        self.seen["found no block again"] += found == 0 < request.kept

    def admit(self, request: Request) -> None:
        """Give a waiting request a slot."""
        self.waiting.remove(request)
        self.running.append(request)

    def form(self, now: int) -> tuple[list[Request], list[Chunk]]:
        """The next step: who decodes, and who computes how much of its prompt."""
        for request in list(self.running):
            self.cancelled(request, now)
        return self.form_transformers(now) if self.transformers else self.form_vllm(now)

    def form_vllm(self, now: int) -> tuple[list[Request], list[Chunk]]:
        """Rules 7, 10 and 11."""
        preempted = False
        while True:
            decodes = [request for request in self.running if request.decoding]
            if self.used([(request, 1) for request in decodes]) <= self.capacity:
                break
            self.preempt_last()
            preempted = True
        for request in decodes:
            self.hold(request, 1)
        step = [(request, 1) for request in decodes]
        budget = self.budget - len(decodes)
        for request in list(self.running):
            if request.decoding:
                continue
            tokens = min(budget, request.rest())
            if self.used([*step, (request, tokens)]) > self.capacity:
                assert request is self.running[-1]
                self.preempt_last()
                preempted = True
                self.seen["preempted prefilling"] += 1
            elif tokens:
                self.hold(request, tokens)
                step.append((request, tokens))
                budget -= tokens
        for request in list(self.waiting):
            if preempted:
                break
            if self.cancelled(request, now):
                continue
            if budget == 0 or len(self.running) == self.max_batch:
                break
            if self.used(step) + self.blocks(request, request.rest()) > self.capacity:
                chunk = self.blocks(request, min(budget, request.rest()))
                fits = self.used(step) + chunk <= self.capacity
                self.seen["only a first chunk would fit" if fits else "no chunk would fit"] += 1
                break
            self.find_again(request)
            self.admit(request)
            tokens = min(budget, request.rest())
            self.hold(request, tokens)
            step.append((request, tokens))
            budget -= tokens
        assert len(self.free) == self.capacity - self.used(step)
        return decodes, step[len(decodes) :]

    def preempt_last(self) -> None:
        """Preempt the most recently admitted running request."""
        request = self.running[-1]
        self.seen["preempted"] += 1
        self.evict(request)
        self.waiting.insert(0, request)

    def form_transformers(self, now: int) -> tuple[list[Request], list[Chunk]]:
        """Scan and reset, again while nothing was chosen and somebody was reset."""
        while True:
            decodes, chunks, skipped = self.scan(now)
            reset: list[Request] = []
            while len(self.running) > 1 and skipped:
                if sum(blocks for _, blocks in skipped) <= self.capacity - self.used():
                    break
                request, _ = skipped.pop()
                self.seen["reset decoding" if request.decoding else "reset prefilling"] += 1
                self.evict(request)
                reset.insert(0, request)
                self.admits = False
            self.waiting += reset
            self.seen["several reset"] += len(reset) > 1
            if decodes or chunks or not reset:
                return decodes, chunks
            self.seen["scan repeated"] += 1

    def scan(self, now: int) -> tuple[list[Request], list[Chunk], list[tuple[Request, int]]]:
        """Who decodes, the chunks of prompts, and who was skipped with the blocks it asked for."""
        decodes: list[Request] = []
        chunks: list[Chunk] = []
        skipped: list[tuple[Request, int]] = []
        budget = self.budget
        if not self.running:
            self.admits = True

        candidates = [request for request in self.running if request.decoding]
        candidates += [request for request in self.running if not request.decoding]
        for request in candidates + self.waiting:
            waits = request in self.waiting
            if waits and self.cancelled(request, now):
                self.seen["cancelled while nobody is admitted"] += not self.admits
                continue
            if budget == 0 or (waits and len(self.running) == self.max_batch):
                break
            if waits and not self.admits:
                self.seen["nobody is admitted"] += 1
                break
            free = self.capacity - self.used()
            if not request.decoding and (decodes or chunks) and 100 * free < 15 * self.capacity:
                self.seen["prompt held back"] += 1
                break
            tokens = 1 if request.decoding else min(budget, request.rest())
            places = request.blocks * self.block_tokens - request.computed
            asks = 0
            if tokens > places or request.blocks == 0:
                asks = (tokens - places + 1) // self.block_tokens + 1
            if asks > free:
                if waits and free == 0:
                    self.seen["scan ended without a free block"] += 1
                    break
                self.seen["skipped waiting" if waits else "stalled"] += 1
                if not waits:
                    skipped.append((request, asks))
                continue
            if waits:
                self.admit(request)
            request.blocks += asks
            budget -= tokens
            if request.decoding:
                decodes.append(request)
            else:
                chunks.append((request, tokens))
        return decodes, chunks, skipped
