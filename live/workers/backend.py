"""A worker of ours behind the `Backend` protocol: kept alive, heard, and its tokens made text."""

import asyncio
import logging
from collections.abc import Mapping
from time import perf_counter

from pydantic import Field

from live.backend import Delta, Events, Job, Progress, Reason
from live.workers.answer import Answer
from live.workers.device import DeviceSpec
from live.workers.launch import Launch, Launched
from live.workers.link import Link
from live.workers.messages import (
    Broken,
    Cancel,
    Draining,
    Ended,
    Failed,
    Formed,
    Ready,
    Refused,
    Stop,
    Submit,
    ToGateway,
)
from live.workers.tokenizer import Tokenizer
from sim.config import ConfigError, Spec

GRACE_S = 5.0  # for a worker to end once its jobs have
REAP_S = 1.0  # for a process to end after its connection
CHECKS = 4  # of silence, within the time that is too long

_log = logging.getLogger(__name__)


class PatienceSpec(Spec):
    """When a worker counts as dead, and how soon there is another."""

    start_s: float = Field(default=600.0, gt=0)  # to load its models
    silence_s: float = Field(default=60.0, gt=0)  # with jobs inside: longer than any step
    backoff_s: float = Field(default=0.5, gt=0)  # before the first restart; doubled for the next
    backoff_most_s: float = Field(default=30.0, gt=0)
    settled_s: float = Field(default=60.0, gt=0)  # who lived so long is restarted as the first time


class _Inside:
    """A job inside the worker."""

    __slots__ = ("answer", "stop_tokens")

    def __init__(self, answer: Answer, stop_tokens: tuple[int, ...]) -> None:
        self.answer, self.stop_tokens = answer, stop_tokens


class Workers:
    """The replicas of one worker; when it dies its jobs fail and another takes its place."""

    def __init__(
        self, name: str, spec: DeviceSpec, tokenizers: Mapping[str, Tokenizer], launch: Launch,
        patience: PatienceSpec,
    ) -> None:  # fmt: skip
        """A worker that is to be started.

        Args:
            name: The backend's.
            spec: What it hosts.
            tokenizers: Of its models, by name.
            launch: Starts it.
            patience: With it.
        """
        self.name = name
        self.replicas = tuple(f"{name}/{model}" for model in spec.models)
        self.told: Ready | None = None  # what the worker says of itself, while it is up
        self._spec, self._launch, self._patience = spec, launch, patience
        self._tokenizers = [tokenizers[model] for model in spec.models]
        self._inside: dict[int, _Inside] = {}
        self._link: Link | None = None
        self._reason = ""  # why the worker ends, where it said so
        self._refusal: str | None = None  # why no worker can ever be
        self._heard_s = 0.0
        self._ready_s: float | None = None
        self._stopping = False

    async def start(self, events: Events) -> None:
        """Begin to come up."""
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._first: asyncio.Future[None] = self._loop.create_future()
        self._first.add_done_callback(lambda first: first.cancelled() or first.exception())
        self._keeper = self._loop.create_task(self._keep())

    async def ready(self) -> None:
        """Wait until the first worker is up.

        Raises:
            ConfigError: if it could not come up.
        """
        await asyncio.shield(self._first)

    def submit(self, job: Job) -> None:
        """Queue a job at its replica; sooner or later its end is reported, once.

        Raises:
            ValueError: for a job without token ids.
        """
        if job.prompt is None:
            raise ValueError(f"job {job.id}: its prompt must be token ids for {job.replica}")
        link = self._link
        if self.told is None or link is None or self._stopping:
            self._loop.call_soon(self._events.failed, job.id, f"{job.replica} is down")
            return
        if not self._inside:
            self._heard_s = perf_counter()
        engine = self.replicas.index(job.replica)
        tokenizer = self._tokenizers[engine]
        forced = job.forced_tokens is not None
        ends = () if forced or job.ignore_eos else tokenizer.stop_tokens
        answer = Answer(tokenizer.stream(job.prompt), () if forced else job.stop)
        self._inside[job.id] = _Inside(answer, ends)
        link.send(
            Submit(
                job=job.id,
                engine=engine,
                sent_s=perf_counter(),
                prompt=[*job.prompt],
                max_tokens=job.max_tokens if job.forced_tokens is None else job.forced_tokens,
                stop_tokens=[*ends],
                first_within_s=job.first_within_s,
                finish_within_s=job.finish_within_s,
            )
        )

    def cancel(self, job: int) -> None:
        """Let a job go, and report it as cancelled unless it has ended already."""
        if job in self._inside and self._link is not None:
            self._link.send(Cancel([job]))

    async def stop(self, drain_s: float) -> None:
        """Finish what is inside, for `drain_s` at most, then end; nothing is left behind."""
        self._stopping = True
        if self.told is not None and self._link is not None:
            self._link.send(Stop(drain_s))
            await asyncio.wait([self._keeper], timeout=drain_s + GRACE_S)
        self._keeper.cancel()
        await asyncio.wait([self._keeper])

    async def _keep(self) -> None:
        """Keep a worker up until no more is wanted, or none can be."""
        pause_s = self._patience.backoff_s
        while not self._stopping:
            up_s = await self._live()
            if self._stopping or self._refusal is not None:
                return
            if up_s >= self._patience.settled_s:
                pause_s = self._patience.backoff_s
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, self._patience.backoff_most_s)

    async def _live(self) -> float:
        """One worker from its start to its end; the seconds that it was up."""
        self._reason, self._ready_s = "", None
        launched = link = None
        reason, ended = "the gateway stops", False
        try:
            async with asyncio.timeout(self._patience.start_s):
                launched = await self._launch(self._spec)
            sock = launched.sock
            _, link = await self._loop.connect_accepted_socket(lambda: Link(self._hear), sock)
            self._link = link
            reason = await self._watch(link)
            ended = link.closed.done()
        except ConfigError as error:
            reason = self._refusal = str(error)
        except TimeoutError:
            reason = f"not started within {self._patience.start_s} s"
        except Exception as error:  # whatever starts workers: the next start may succeed
            reason = f"not started: {type(error).__name__}: {error}"
        finally:
            up_s = 0.0 if self._ready_s is None else perf_counter() - self._ready_s
            if link is not None:
                link.close()
            self._fall(reason)
            if launched is not None:
                reason = f"{reason} ({await self._reap(launched, ended)})"
            if not self._stopping:
                _log.warning("worker %s is down: %s", self.name, reason)
            if not self._first.done():
                self._first.set_exception(ConfigError("backends", self.name, reason))
        return up_s

    async def _watch(self, link: Link) -> str:
        """Wait until the worker ends, or is to be ended; why."""
        begin_s, patience = perf_counter(), self._patience
        check_s = min(patience.start_s, patience.silence_s) / CHECKS
        while True:
            await asyncio.wait([link.closed], timeout=check_s)
            now_s = perf_counter()
            if link.closed.done():
                return self._reason or link.closed.result()
            if self._ready_s is None and now_s - begin_s > patience.start_s:
                return f"not ready within {patience.start_s} s"
            if self._inside and now_s - self._heard_s > patience.silence_s:
                return f"silent for {patience.silence_s} s with {len(self._inside)} jobs inside"

    async def _reap(self, launched: Launched, ended: bool) -> str:
        """See that a worker is gone; one that ended by itself is given the time to say how."""
        ending = self._loop.create_task(launched.ended())
        if ended:
            await asyncio.wait([ending], timeout=REAP_S)
        launched.kill()
        return await ending

    def _fall(self, reason: str) -> None:
        """The worker is gone, and what was inside with it."""
        self._link = None
        self._lower(reason)
        failed, self._inside = [*self._inside], {}
        for job in failed:
            self._events.failed(job, reason)

    def _lower(self, reason: str) -> None:
        """The worker takes no jobs."""
        self.told = None
        for replica in self.replicas:
            self._events.down(replica, reason)

    def _hear(self, message: ToGateway) -> None:
        self._heard_s = perf_counter()
        match message:
            case Ended():
                self._step(message)
            case Formed():
                self._form(message)
            case Ready():
                self.told, self._ready_s = message, self._heard_s
                for replica in self.replicas:
                    self._events.up(replica)
                if not self._first.done():
                    self._first.set_result(None)
            case Refused(job, text):
                if self._inside.pop(job, None) is not None:
                    self._events.refused(job, 400, text)
            case Failed(job, reason):
                if self._inside.pop(job, None) is not None:
                    self._events.failed(job, reason)
            case Draining(reason):
                self._lower(reason)
            case Broken(reason, refused):
                self._reason = reason
                if refused:
                    self._refusal = reason

    def _form(self, formed: Formed) -> None:
        """Who left and who began, as a step was formed."""
        replica, inside = self.replicas[formed.engine], self._inside
        expired = [job for job in formed.expired if inside.pop(job, None) is not None]
        reset = [job for job in formed.reset if job in inside]
        if expired or reset:
            left = Progress(expired=expired, reset=reset, blocks_used=formed.blocks_used)
            self._events.stepped(replica, left)
        admitted = [job for job in formed.admitted if job in inside]
        if admitted:
            self._events.began(replica, admitted, formed.blocks_used)

    def _step(self, ended: Ended) -> None:
        """What a step did, in text."""
        inside, done = self._inside, frozenset(ended.finished)
        emitted: list[tuple[int, Delta]] = []
        finished: list[tuple[int, Reason]] = []
        stopped: list[int] = []
        for job, token in ended.emitted:
            own = inside.get(job)
            if own is None:
                continue
            ends = token in own.stop_tokens
            text = "" if ends else own.answer.add(token)
            if own.answer.stopped:
                finished.append((job, "stop"))
                if job not in done:
                    stopped.append(job)
            elif job in done:
                text += own.answer.rest()
                finished.append((job, "stop" if ends else "length"))
            emitted.append((job, Delta(1, text)))
        chunks = [chunk for chunk in ended.chunks if chunk[0] in inside]
        for job, _ in finished:
            del inside[job]
        if stopped and self._link is not None:
            self._link.send(Cancel(stopped))
        progress = Progress(
            chunks=chunks,
            emitted=emitted,
            finished=finished,
            cancelled=[job for job in ended.cancelled if inside.pop(job, None) is not None],
            blocks_used=ended.blocks_used,
            step_s=ended.step_s,
        )
        self._events.stepped(self.replicas[ended.engine], progress)
