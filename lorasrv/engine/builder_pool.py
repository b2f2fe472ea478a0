"""Reads adapters' page images for the host cache in processes of their own, into pages of one arena."""

import select
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from lorasrv.engine.builder_messages import Build, Built, Failed, Measure, Measured, Message, Started
from lorasrv.errors import AdapterLoadFailed
from lorasrv.memory.arena import HostArena
from lorasrv.memory.packing import PackedAdapter
from lorasrv.sched.queue import MAX_SLOW_READS
from lorasrv_adapters.errors import CorruptBlob
from lorasrv_adapters.host_cache import HostCache

# A read that takes this long gets no faster by waiting for it: one more builder goes on with the others. So one tenant,
# whose slow reads are bounded by as many, cannot hang them all.
_SLOW_S = 1.0
_MORE_BUILDERS = MAX_SLOW_READS
# Builders that were killed and are not gone, since the system is stuck in their reads: with more, others begin none.
_MAX_LINGERING = 32
_MAX_ATTEMPTS = 2
_CLOSE_S = 5.0


class Builder(Protocol):
    """`builder_child.BuilderChild`, or a test's."""

    def fileno(self) -> int: ...

    def send(self, message: Measure | Build) -> None: ...

    def receive(self) -> list[Message] | None: ...

    def close(self) -> None: ...

    def kill(self) -> None: ...

    def has_ended(self) -> bool: ...

    def wait(self, timeout_s: float) -> None: ...


@dataclass(kw_only=True)
class _Job:
    """A read. `since_s` is when the builder was given `message`, None while the cache has the next word. A build whose
    `places` are not free yet has no builder at work; those of a measurement are what it may build in at once."""

    digest: str
    builder: Builder
    message: Measure | Build
    since_s: float | None
    num_attempts: int = 1
    measured: Measured | None = None
    places: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class _Killed:
    """A builder that may not be gone yet, the read that it was killed in, and the pages that it may still write to."""

    builder: Builder
    at_s: float
    digest: str | None = None
    places: tuple[int, ...] = ()


class BuilderPool:
    """An `image_readers.ImageSource`. Owned by the engine's thread, and without one of its own.

    A builder that takes too long is killed, and one that dies is replaced: the first costs its own adapter this
    attempt, the second a second try. Pages that a killed builder was given are free again once it is gone for good.
    """

    def __init__(
        self,
        arena: HostArena,
        num_headers: int,
        spawn: Callable[[], Builder],
        *,
        num_builders: int,
        num_ahead: int,
        read_timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`num_headers` are those of every adapter's directory. `spawn` may raise OSError. So many pages of the arena
        as `num_ahead` are beyond what the cache holds: images are built there before their size is known."""
        self._arena = arena
        self._num_headers = num_headers
        self._spawn = spawn
        self._num_builders = num_builders
        # The reads that `deliver` has found slow, and those that it found so the time before.
        self._slow: frozenset[str] = frozenset()
        self._told_slow: frozenset[str] = frozenset()
        self._num_ahead = num_ahead
        self._largest = 0  # pages of the largest image so far: the next is taken to be no larger
        self._read_timeout_s = read_timeout_s
        self._clock = clock
        self._idle = [spawn() for _ in range(num_builders)]
        self._jobs: dict[str, _Job] = {}
        self._killed: list[_Killed] = []
        self._given_up: dict[str, Exception] = {}
        self._held: set[int] = set()  # pages of images that the cache has

    @property
    def is_free(self) -> bool:
        return len(self._jobs) < self._num_allowed and len(self._lingering) <= _MAX_LINGERING

    @property
    def reading(self) -> Mapping[str, bool]:
        """With those slow that the last `deliver` found so."""
        return {digest: digest in self._slow for digest in self._jobs}

    def measure(self, digest: str) -> None:
        if digest in self._lingering:
            self._given_up[digest] = AdapterLoadFailed("the last attempt at reading it still hangs")
            return
        builder = self._take_builder(digest)
        if builder is not None:
            places = self._places_ahead()
            message = Measure(digest=digest, places=places)
            self._jobs[digest] = _Job(
                digest=digest, builder=builder, message=message, since_s=self._clock(), places=places or None
            )
            builder.send(message)

    def build(self, digest: str) -> PackedAdapter | None:
        job = self._jobs[digest]
        assert job.measured is not None, job
        if job.measured.built:
            self._idle.append(self._jobs.pop(digest).builder)
            return self._image(job)
        job.message, job.since_s = Build(digest=digest, places=()), self._clock()
        self._start_build(job)
        return None

    def abandon(self, digest: str) -> None:
        job = self._jobs.pop(digest)
        self._arena.free(job.places or ())
        self._idle.append(job.builder)

    def free(self, image: PackedAdapter) -> None:
        self._held.difference_update(image.places)
        self._arena.free(image.places)

    def deliver(self, cache: HostCache[PackedAdapter]) -> None:
        self._told_slow = self._slow
        for digest, error in list(self._given_up.items()):
            del self._given_up[digest]
            cache.finished(digest, error)
        for job in list(self._jobs.values()):
            self._hear(job, cache)
        for job in list(self._jobs.values()):
            if self._takes_longer(job, self._read_timeout_s):
                self._kill_reading(job)
                message = f"reading it took longer than {self._read_timeout_s:g} s"
                self._end(job, AdapterLoadFailed(message), cache)
        self._reap()
        for job in self._jobs.values():
            if isinstance(job.message, Build) and job.places is None:
                self._start_build(job)
        while self._idle and len(self._idle) + len(self._jobs) > self._num_allowed:
            self._dismiss(self._idle.pop())
        self._slow = frozenset(job.digest for job in self._jobs.values() if self._takes_longer(job, _SLOW_S))

    def wait(self, timeout_s: float) -> None:
        if self._given_up:
            return
        poll = select.poll()
        for job in self._jobs.values():
            poll.register(job.builder.fileno(), select.POLLIN)
        poll.poll(1000 * timeout_s)

    def check(self) -> None:
        """Raise AssertionError on a broken invariant."""
        self._arena.check()
        used = [*self._held]
        used += [place for job in self._jobs.values() for place in job.places or ()]
        used += [place for killed in self._killed for place in killed.places]
        assert len(used) == len(set(used)) and self._arena.used == set(used), "host pages leaked"
        builders = [*self._idle, *(job.builder for job in self._jobs.values())]
        assert len({id(builder) for builder in builders}) == len(builders), "two reads share a builder"
        assert len(builders) <= self._num_builders + _MORE_BUILDERS, "too many builders"

    def close(self) -> None:
        """After the cache, which frees its images."""
        for builder in self._idle:
            self._kill(builder)
        for job in self._jobs.values():
            self._kill_reading(job)
        for killed in self._killed:
            killed.builder.wait(_CLOSE_S)
        self._reap()
        self._idle.clear()
        self._jobs.clear()
        self._given_up.clear()
        self._arena.close()

    @property
    def _num_allowed(self) -> int:
        """Builders that may be at work: one more for each slow read, so that it delays no other. Not before who wants
        reads has been told that it is slow, and may want others."""
        return self._num_builders + min(len(self._told_slow & self._jobs.keys()), _MORE_BUILDERS)

    @property
    def _lingering(self) -> list[str]:
        """Reads that even killing their builders has not ended."""
        latest_s = self._clock() - _SLOW_S
        return [killed.digest for killed in self._killed if killed.digest is not None and killed.at_s < latest_s]

    def _takes_longer(self, job: _Job, seconds: float) -> bool:
        return job.since_s is not None and self._clock() - job.since_s > seconds

    def _take_builder(self, digest: str) -> Builder | None:
        """An idle builder or a new one; None, and the read is given up, where no process can be started."""
        while self._idle:
            builder = self._idle.pop()
            if not builder.has_ended():
                return builder
            self._kill(builder)
        try:
            return self._spawn()
        except OSError as error:
            self._given_up[digest] = error
            return None

    def _places_ahead(self) -> tuple[int, ...]:
        """Pages to build in before it is known how many are needed; none where that could take them from an image that
        the cache has made room for."""
        used = sum(len(job.places or ()) for job in self._jobs.values() if isinstance(job.message, Measure))
        used += sum(len(killed.places) for killed in self._killed)
        if not 0 < self._largest <= self._num_ahead - used:
            return ()
        return self._arena.alloc(self._largest) or ()

    def _keep_places(self, job: _Job, num_pages: int) -> None:
        """Of those that a measurement was given."""
        places = job.places or ()
        self._arena.free(places[num_pages:])
        job.places = places[:num_pages] or None

    def _start_build(self, job: _Job) -> None:
        """Unless pages that the cache has counted as free still belong to a killed builder."""
        assert job.measured is not None and job.places is None, job
        job.places = self._arena.alloc(job.measured.num_pages)
        if job.places is not None:
            job.message, job.since_s = Build(digest=job.digest, places=job.places), self._clock()
            job.builder.send(job.message)

    def _hear(self, job: _Job, cache: HostCache[PackedAdapter]) -> None:
        messages = job.builder.receive()
        if messages is None:
            self._try_again(job, cache)
            return
        for message in messages:
            match message:
                case Started():
                    # A read does not pay for its builder's start.
                    job.since_s = self._clock() if job.since_s is not None else None
                case Measured():
                    job.measured, job.since_s = message, None
                    self._largest = max(self._largest, message.num_pages)
                    self._keep_places(job, message.num_pages if message.built else 0)
                    cache.measured(job.digest, message.num_pages * self._arena.pages.shape[1])
                case Built():
                    self._idle.append(job.builder)
                    self._end(job, self._image(job), cache)
                case Failed():
                    self._idle.append(job.builder)
                    self._arena.free(job.places or ())
                    self._end(job, (CorruptBlob if message.corrupt else AdapterLoadFailed)(message.message), cache)
                case _:
                    raise TypeError(f"{type(message).__name__} is no message from a builder")

    def _try_again(self, job: _Job, cache: HostCache[PackedAdapter]) -> None:
        """Its builder has died: that may be its own doing, or not."""
        if job.num_attempts == _MAX_ATTEMPTS:
            self._kill_reading(job)
            self._end(job, AdapterLoadFailed("the process that read it died"), cache)
            return
        self._kill(job.builder)
        builder = self._take_builder(job.digest)
        if builder is None:
            self._arena.free(job.places or ())
            self._end(job, self._given_up.pop(job.digest), cache)
            return
        job.builder, job.num_attempts = builder, job.num_attempts + 1
        if job.since_s is not None and (isinstance(job.message, Measure) or job.places is not None):
            job.since_s = self._clock()
            builder.send(job.message)

    def _image(self, job: _Job) -> PackedAdapter:
        assert job.measured is not None and job.places is not None, job
        self._held.update(job.places)
        return PackedAdapter(
            pages=self._arena.pages,
            places=job.places,
            num_headers=self._num_headers,
            num_tiles=job.measured.num_tiles,
            max_rank=job.measured.max_rank,
        )

    def _end(self, job: _Job, result: PackedAdapter | Exception, cache: HostCache[PackedAdapter]) -> None:
        del self._jobs[job.digest]
        cache.finished(job.digest, result)

    def _dismiss(self, builder: Builder) -> None:
        """It has nothing to do, and ends on its own."""
        builder.close()
        self._killed.append(_Killed(builder=builder, at_s=self._clock()))

    def _kill_reading(self, job: _Job) -> None:
        self._kill(job.builder, job.digest, job.places or ())

    def _kill(self, builder: Builder, digest: str | None = None, places: tuple[int, ...] = ()) -> None:
        builder.kill()
        self._killed.append(_Killed(builder=builder, at_s=self._clock(), digest=digest, places=places))

    def _reap(self) -> None:
        for killed in [each for each in self._killed if each.builder.has_ended()]:
            self._arena.free(killed.places)
            self._killed.remove(killed)
