"""The thread that owns the engines: jobs wait, join a running batch, advance by cycles, and leave. Nothing of HTTP.

Every other thread speaks to it through three thread-safe calls: `submit`, `cancel` and `drain`.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Final

from transformers import PreTrainedTokenizerBase

from orthrus.decode.engine import Engine, Progress
from orthrus.decode.output import Stats
from orthrus.serve.jobs import Draining, Event, Job, Overloaded, TimedOut, Watcher
from orthrus.serve.logprobs import scored


@dataclass(slots=True)
class _Lane:
    """One engine and the jobs in its rows."""

    engine: Engine
    jobs: dict[int, Job] = field(default_factory=dict)


class Loop:
    """Decode jobs from any thread on a thread of its own: `rows` in flight per mode; `queue` that wait, no more.

    `engines` makes the engine of each mode, when a job first asks for it; `watcher` is told what happens.
    """

    JOIN_SECONDS: Final = 30.0

    def __init__(
        self,
        engines: Mapping[str, Callable[[], Engine]],
        *,
        tokenizer: PreTrainedTokenizerBase,
        rows: int,
        queue: int,
        watcher: Watcher,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rows, self.queue, self.clock = rows, queue, clock
        self._make, self._tokenizer, self._watcher = engines, tokenizer, watcher
        self._lanes: dict[str, _Lane] = {}
        self._waiting: deque[Job] = deque()
        self._commands: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._lock = threading.RLock()  # a signal's handler may come while its own thread holds it
        self.open = 0  # jobs that have been submitted and not ended
        self._drained: Callable[[], None] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="orthrus-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """False once the thread has ended."""
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        """True once the loop takes no more jobs."""
        return self._drained is not None or self._closed

    @property
    def running(self) -> int:
        return sum(len(lane.jobs) for lane in list(self._lanes.values()))

    @property
    def waiting(self) -> int:
        """Jobs that have not joined a batch yet."""
        return max(0, self.open - self.running)

    @property
    def positions(self) -> int:
        jobs = [job for lane in list(self._lanes.values()) for job in list(lane.jobs.values())]
        return sum(len(job.prompt_ids) + job.emitted for job in jobs)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all of them or none; raises Overloaded or, where the server is shutting down, Draining."""
        with self._lock:
            if self.draining or not self.alive:
                raise Draining("the server is shutting down: send the request to another one, or later")
            if self.open + len(jobs) > self.rows + self.queue:
                raise Overloaded(
                    f"the server decodes {self.rows} completions and lets {self.queue} wait, {self.open} are here and "
                    f"{len(jobs)} more were asked for: try again later"
                )
            self.open += len(jobs)
        now = self.clock()
        for job in jobs:
            job.submitted = now
        self._commands.put(lambda: self._waiting.extend(jobs))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """End jobs whose text nobody wants any more; they get no further event, and their rows are free next cycle."""

        def end() -> None:
            for job in jobs:
                self._end(job, "abort")

        self._commands.put(end)

    def drain(self, done: Callable[[], None]) -> None:
        """Take no more jobs, and call `done` on the loop's thread when the last one has ended."""
        with self._lock:
            self._drained = self._drained or done
        self._commands.put(lambda: None)

    def close(self) -> None:
        """End the thread; jobs still open end with `Draining`."""
        with self._lock:
            self._closed = True
        self._commands.put(lambda: None)
        if self.alive:
            self._thread.join(self.JOIN_SECONDS)

    def _run(self) -> None:
        try:
            while not self._closed:
                self._obey(wait=self._idle)
                self._expire()
                self._admit()
                for mode, lane in list(self._lanes.items()):
                    if lane.jobs:
                        self._step(mode, lane)
                if self._drained is not None and not self.open:
                    break
        finally:
            with self._lock:
                self._closed = True
            self._obey(wait=False)  # what was submitted while the last cycle ran
            for job in self._jobs():
                self._fail(job, "abort", Draining("the server was stopped before the text ended"))
            if self._drained is not None:
                self._drained()

    @property
    def _idle(self) -> bool:
        """True when only a command can give the thread something to do."""
        return not self._jobs() and self._drained is None

    def _obey(self, *, wait: bool) -> None:
        """Carry out all commands that have come; with `wait`, at least one."""
        try:
            while True:
                self._commands.get(block=wait)()
                wait = False
        except Empty:
            return

    def _jobs(self) -> list[Job]:
        return [*(job for lane in self._lanes.values() for job in lane.jobs.values()), *self._waiting]

    def _expire(self) -> None:
        now = self.clock()
        for job in self._jobs():
            if job.deadline is not None and now >= job.deadline:
                seconds = f"{now - job.submitted:.0f} seconds"
                error = TimedOut(f"the request took longer than this server allows ({seconds}): ask for fewer tokens")
                self._fail(job, "timeout", error)

    def _admit(self) -> None:
        """Move waiting jobs into free rows, in the order of their arrival."""
        still: deque[Job] = deque()
        while self._waiting:
            job = self._waiting.popleft()
            if job.done:
                continue
            try:
                lane = self._lanes.get(job.mode) or self._lanes.setdefault(job.mode, _Lane(self._make[job.mode]()))
                if len(lane.jobs) >= self.rows:
                    still.append(job)
                    continue
                job.id = lane.engine.add(job.prompt_ids, job.options, tokenizer=self._tokenizer, index=job.index)
            except Exception as error:
                self._fail(job, "error", error)
                continue
            lane.jobs[job.id] = job
            job.started = self.clock()
            self._watcher.started(job, job.started)
        self._waiting = still

    def _step(self, mode: str, lane: _Lane) -> None:
        """Run one cycle and hand out what it gave; one that fails takes the jobs of its batch with it, no others."""
        try:
            progress = lane.engine.step()
            now = self.clock()
            for one in progress:
                if one.row.id in lane.jobs:
                    self._advance(lane.jobs[one.row.id], one, now)
        except Exception as error:
            del self._lanes[mode]  # its cache is in an unknown state: the next job gets an engine of its own
            for job in list(lane.jobs.values()):
                self._fail(job, "error", error)

    def _advance(self, job: Job, progress: Progress, now: float) -> None:
        row = progress.row
        reason = row.finish_reason
        if reason == "error":
            self._fail(job, reason, row.error or RuntimeError("the engine gave the row up"))
            return
        event = Event(
            token_ids=progress.token_ids,
            first=progress.first,
            accepted=progress.accepted,
            drafted=row.stats.drafted - job.drafted,
            finish_reason=reason,
            stats=Stats.total([row.stats]),
            cached=row.cached,
            scored=scored(progress.kept.logits_NV, progress.token_ids, job.top)
            if progress.kept is not None and job.top is not None
            else (),
        )
        job.drafted, job.emitted = row.stats.drafted, row.stats.emitted
        job.first = job.first or now
        self._watcher.advanced(job, event, now)
        job.latest = now
        if reason is not None:
            self._end(job, reason, row.stats, abort=False)
        job.deliver(event)

    def _fail(self, job: Job, reason: str, error: Exception) -> None:
        if not job.done:
            self._end(job, reason)
            job.deliver(Event(error=error))

    def _end(self, job: Job, reason: str, stats: Stats | None = None, *, abort: bool = True) -> None:
        """Forget a job, and free its row unless the engine has done so."""
        if job.done:
            return
        job.done = True
        lane = self._lanes.get(job.mode)
        if lane is not None and job.id is not None and lane.jobs.pop(job.id, None) is not None and abort:
            lane.engine.abort(job.id)
        if job in self._waiting:
            self._waiting.remove(job)
        with self._lock:
            self.open -= 1
        self._watcher.ended(job, reason, stats, self.clock())
