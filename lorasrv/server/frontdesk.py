"""Admission, below all front ends: look up and pin the adapter, tokenize, check, submit, and turn tokens to text."""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import Executor, Future
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from tokenizers import Tokenizer

from lorasrv.engine.admission import TokenLimits, check_request, engine_request
from lorasrv.engine.chat import ChatTemplate
from lorasrv.engine.client import Engine
from lorasrv.engine.defaults import VersionDefaults, read_defaults
from lorasrv.engine.output import OutputStream
from lorasrv.engine.prompts import read_prompt
from lorasrv.engine.vocabulary import Vocabulary
from lorasrv.errors import AdapterCorrupt, Draining, EngineUnavailable, GenerationExists, InvalidRequest
from lorasrv.requests import AdapterRef, Chat, Delta, Event, Finished, GenerationRequest, Prompt, Queued, Started
from lorasrv.server.seen import SeenVersions
from lorasrv.types import BASE_ID, AdapterUse, EngineRequest, Tier
from lorasrv_adapters.records import ResolvedVersion

# How long an adapter that is to be warm is waited for when the call has no deadline; the wire's WarmAdapter says so.
WARM_S = 60.0


class Versions(Protocol):
    """The part of the registry that admission needs. May block; safe to call from worker threads."""

    def acquire(self, tenant: str, reference: str) -> ResolvedVersion: ...

    def unpin(self, digest: str) -> None: ...

    def quarantine(self, digest: str) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Served:
    """What serves a generation: a pinned version with its defaults, or the base model, which has none."""

    use: AdapterUse | None = None
    defaults: VersionDefaults = field(default_factory=VersionDefaults)


@dataclass(frozen=True, kw_only=True)
class Admission:
    """An admitted generation, on its way to its end."""

    generation_id: str
    engine_request: EngineRequest
    stop: tuple[str, ...]
    received_s: float


class FrontDesk:
    """Follows generations from the call to the last event. Belongs to the event loop; what blocks goes to threads.

    Text has `workers`, the registry `pinning`: however long prompts take to tokenize, admissions of tokens go on.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        limits: TokenLimits,
        versions: Versions,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        workers: Executor,
        pinning: Executor,
        seen: SeenVersions,
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._versions = versions
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._vocabulary = Vocabulary(tokenizer)
        self._workers = workers
        self._pinning = pinning
        self._seen = seen
        self._running: set[tuple[str, str]] = set()
        self._suspected: set[str] = set()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def draining(self) -> bool:
        return self._draining

    async def system_prompt(self, tenant: str, adapter: AdapterRef) -> str | None:
        """That of the version which the reference means now. Raises the registry's errors for the adapter."""
        async with self._served(tenant, adapter) as served:
            return served.defaults.system_prompt

    async def warm(
        self, tenant: str, reference: str, tier: Tier, deadline_s: float | None
    ) -> tuple[ResolvedVersion, Tier]:
        """The version that the reference means now, once it is in `tier` or above, and where it then is.

        Raises InvalidRequest, Draining, the registry's errors for the reference, and those of `Engine.warm`.
        """
        self._refuse_when_draining()
        if reference == BASE_ID:
            raise InvalidRequest("reference", f"{BASE_ID!r} is the base model, which is always in memory")
        async with self._pinned(tenant, reference) as version:
            deadline_s = time.monotonic() + WARM_S if deadline_s is None else deadline_s
            return version, await self._engine.warm(version.digest, tier, deadline_s)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        """One Started, Queued now and then while it waits, then the Deltas of all samples, each sample's ended by its
        Finished.

        Closing the generator early cancels the engine's work.

        Raises the errors of `engine.admission`, GenerationExists, Draining, EngineUnavailable, the registry's errors
        for the adapter, and what the engine raises.
        """
        received_s = time.monotonic()
        adapter = check_request(request)
        generation_id = request.generation_id or uuid.uuid4().hex
        with self._register(request.tenant, generation_id):
            async with self._served(request.tenant, adapter) as served:
                if request.ignore_version_defaults:
                    served = replace(served, defaults=VersionDefaults())
                text, token_ids = await self._read(request.prompt, served.defaults.system_prompt)
                admission = Admission(
                    generation_id=generation_id,
                    engine_request=self._engine_request(request, token_ids, served),
                    stop=request.sampling.over(served.defaults.sampling).stop,
                    received_s=received_s,
                )
                yield Started(
                    generation_id=generation_id,
                    version_digest=None if served.use is None else served.use.digest,
                    prompt_tokens=len(token_ids),
                    seed=admission.engine_request.seed,
                    prompt=await self._echo(text, token_ids) if request.echo else None,
                )
                async with aclosing(self._follow(admission)) as events:
                    async for event in events:
                        yield event

    def stop_admitting(self) -> None:
        """For good; what runs goes on."""
        self._draining = True

    async def drain(self, grace_s: float) -> bool:
        """Admit nothing more and wait for what runs; False when some still runs after `grace_s`."""
        self.stop_admitting()
        try:
            await asyncio.wait_for(self._idle.wait(), grace_s)
        except TimeoutError:
            return False
        return True

    def _refuse_when_draining(self) -> None:
        if self._draining:
            raise Draining("the server is shutting down")

    @contextmanager
    def _register(self, tenant: str, generation_id: str) -> Iterator[None]:
        self._refuse_when_draining()
        key = (tenant, generation_id)
        if key in self._running:
            raise GenerationExists(f"generation {generation_id!r} is running already")
        self._running.add(key)
        self._idle.clear()
        try:
            yield
        finally:
            self._running.remove(key)
            if not self._running:
                self._idle.set()

    @asynccontextmanager
    async def _served(self, tenant: str, adapter: AdapterRef) -> AsyncIterator[Served]:
        """The version that the reference means now, pinned until the block is left; or the base."""
        if adapter.name == BASE_ID:
            yield Served()
            return
        async with self._pinned(tenant, adapter.name) as version:
            yield Served(
                use=AdapterUse(digest=version.digest, scale=1.0 if adapter.scale is None else adapter.scale),
                defaults=read_defaults(version.serving),
            )

    @asynccontextmanager
    async def _pinned(self, tenant: str, reference: str) -> AsyncIterator[ResolvedVersion]:
        """The version that the reference means now, kept from deletion until the block is left."""
        pinning = self._pinning.submit(self._versions.acquire, tenant, reference)
        try:
            version = await asyncio.shield(asyncio.wrap_future(pinning))
            self._seen.note(tenant, version.digest, version.adapter_id)
            yield version
        except AdapterCorrupt:
            await self._quarantine(pinning.result().digest)
            raise
        finally:
            # Shielded, and waiting for `pinning` in the worker: a cancelled call gives its pin back too.
            await asyncio.shield(asyncio.wrap_future(self._pinning.submit(self._unpin, pinning)))

    async def _quarantine(self, digest: str) -> None:
        """Have a version's blobs looked at, by one worker at a time; later requests for it are refused at once."""
        if digest in self._suspected:
            return
        self._suspected.add(digest)
        try:
            await asyncio.shield(asyncio.wrap_future(self._workers.submit(self._versions.quarantine, digest)))
        finally:
            self._suspected.remove(digest)

    def _unpin(self, pinning: Future[ResolvedVersion]) -> None:
        if pinning.exception() is None:
            self._versions.unpin(pinning.result().digest)

    def _engine_request(self, request: GenerationRequest, token_ids: tuple[int, ...], served: Served) -> EngineRequest:
        # Generation ids are a tenant's own.
        checked = engine_request(
            uuid.uuid4().hex,
            token_ids,
            adapter=served.use,
            sampling=request.sampling,
            limits=self._limits,
            defaults=served.defaults.sampling,
            tenant=request.tenant,
        )
        return replace(
            checked,
            weight=request.weight,
            priority=request.priority,
            session_key=request.session_key,
            deadline_s=request.deadline_s,
        )

    async def _read(
        self, prompt: str | tuple[int, ...] | Chat | None, system_prompt: str | None
    ) -> tuple[str | None, tuple[int, ...]]:
        """The prompt's text, unless it came as tokens, and its tokens."""
        if not isinstance(prompt, str | Chat):
            return None, prompt or ()
        read = await asyncio.get_running_loop().run_in_executor(
            self._workers, read_prompt, prompt, self._tokenizer, self._chat_template, system_prompt
        )
        return read.text, read.token_ids

    async def _echo(self, text: str | None, token_ids: tuple[int, ...]) -> Prompt:
        if text is not None:
            return Prompt(text=text, token_ids=token_ids)
        decode = self._tokenizer.decode
        decoded = await asyncio.get_running_loop().run_in_executor(self._workers, decode, list(token_ids))
        return Prompt(text=decoded, token_ids=token_ids)

    async def _follow(self, admission: Admission) -> AsyncGenerator[Event, None]:
        request = admission.engine_request
        samples = {
            index: _Sample(OutputStream(self._vocabulary, request, admission.stop)) for index in range(request.n)
        }
        async with aclosing(self._engine.stream(request)) as deltas:
            async for delta in deltas:
                if delta.queue_position is not None:
                    yield Queued(position=delta.queue_position)
                    continue
                sample = samples[delta.sample]
                if delta.token_ids and sample.first_token_s is None:
                    sample.first_token_s = time.monotonic() - admission.received_s
                piece = sample.output.take(delta)
                if piece.finish is not None:
                    del samples[delta.sample]
                    if delta.finish is None:
                        self._engine.cancel(request.request_id, delta.sample)
                yield Delta(
                    index=delta.sample,
                    text=piece.text,
                    token_ids=piece.token_ids,
                    logprobs=piece.logprobs,
                    prompt_logprobs=delta.prompt_logprobs,
                )
                if piece.finish is None:
                    continue
                yield Finished(
                    index=delta.sample,
                    reason=piece.finish,
                    stop=piece.stop,
                    prompt_tokens=len(request.token_ids),
                    completion_tokens=sample.output.num_tokens,
                    time_to_first_token_s=sample.first_token_s,
                    total_s=time.monotonic() - admission.received_s,
                )
                if not samples:
                    return
        raise EngineUnavailable("the engine ended the generation without a result")


@dataclass
class _Sample:
    """One sample on its way."""

    output: OutputStream
    first_token_s: float | None = None
