"""Many generations at once over one client, their results in the order they were asked for."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lorasrv.client.aio import AsyncClient
from lorasrv.client.errors import ClientError, PermissionDenied, Unauthenticated, Unavailable
from lorasrv.client.messages import Prompt
from lorasrv.v1 import generation_pb2


@dataclass(frozen=True, kw_only=True)
class Job:
    """One generation to do; `sampling` as in `messages.generate_request`."""

    prompt: Prompt
    adapter: str
    sampling: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How job number `index` went."""

    index: int
    job: Job
    result: generation_pb2.GenerateResponse | ClientError


async def generate_all(
    client: AsyncClient,
    jobs: Sequence[Job],
    concurrency: int,
    emit: Callable[[Outcome], None],
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Run all jobs, `concurrency` at a time. Cancelling cancels what runs.

    `emit` gets the outcomes in the order of `jobs`, each as soon as those before it are there; `advance` is called
    once for each job that ends, in any order. A job that fails does not end the others, but a server that is not
    there, or lets nobody in, does: raises Unavailable, Unauthenticated or PermissionDenied.
    """
    waiting = iter(enumerate(jobs))
    early: dict[int, Outcome] = {}
    num_emitted = 0

    async def work() -> None:
        nonlocal num_emitted
        for index, job in waiting:
            early[index] = await _run(client, index, job)
            advance()
            while num_emitted in early:
                emit(early.pop(num_emitted))
                num_emitted += 1

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(jobs))):
                group.create_task(work())
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None


async def _run(client: AsyncClient, index: int, job: Job) -> Outcome:
    try:
        result = await client.generate(job.prompt, adapter=job.adapter, **job.sampling)
    except (Unavailable, Unauthenticated, PermissionDenied):
        raise
    except ClientError as error:
        return Outcome(index=index, job=job, result=error)
    return Outcome(index=index, job=job, result=result)
