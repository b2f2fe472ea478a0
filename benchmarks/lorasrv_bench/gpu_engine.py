"""The engine's steps against the bytes they touch: decode at a few batches and numbers of adapters, long prompts,
copies of adapters beside the steps, and what `deterministic` costs."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from lorasrv.engine.batch import ChunkInput
from lorasrv.memory.storage import AdapterCopy
from lorasrv_bench.gpu_engine_rig import RANK, Rig, build, check_step, decodes, draws
from lorasrv_bench.gpu_floors import step_floor
from lorasrv_bench.gpu_pool import DTYPE
from lorasrv_bench.gpu_records import DONE, Record, timed
from lorasrv_bench.gpu_section import NotRun, Section, WrongOutput
from lorasrv_bench.gpu_sgmv_cases import some
from lorasrv_bench.gpu_timing import Timing

_WARM_UP = 3
# Steps are submitted this fast only if copies behind each other never run dry.
_COPIES_IN_FLIGHT = 8
_TEMPERATURE = 0.8
# For one timing of a long prompt.
_PREFILL_S = 3.0


def run_decode(section: Section) -> None:
    with section.case({"what": "the model"}):
        rig = build(section)
        _decodes(section, rig, section.size.decodes)
        for rank in (0, *section.size.prefill_ranks):
            case = {"prefill": section.size.prefill_tokens, "rank": rank}
            section.each({"": case}, lambda _, rank=rank, case=case: _prefill(section, rig, rank, case), 3.0)
        copies = {"copies": "while decoding"}
        section.each({"": copies}, lambda _: _copies(section, rig, copies), 3.0)
        _decodes(section, rig, section.size.more_decodes)


def run_deterministic(section: Section) -> None:
    """Decode and a long prompt once more, under the option; the table compares them with what `run_decode` found."""
    # Its kernels are many small calls where there are adapters: few steps, and those of the base model first.
    section = replace(section, size=replace(section.size, num_steps=min(section.size.num_steps, 8)))
    with section.case({"what": "the model"}):
        rig = build(section, deterministic=True)
        base, most = _deterministic_loads(section)
        _decodes(section, rig, [base])
        case = {"prefill": section.size.prefill_tokens, "rank": 0}
        section.each({"": case}, lambda _: _prefill(section, rig, 0, case), 3.0)
        _decodes(section, rig, [most])


def _deterministic_loads(section: Section) -> tuple[tuple[int, int], tuple[int, int]]:
    """The largest batch up to 64 that the default was timed at, without adapters and with the most."""
    done = [
        (int(str(r.case["adapters"])), int(str(r.case["batch"])))
        for r in section.results.records()
        if r.section == "engine" and r.status == DONE and "batch" in r.case
    ] or list(section.size.decodes)
    batch = max((b for _, b in done if b <= 64), default=done[0][1])
    loads = [n for n, b in done if b == batch]
    return (min(loads), batch), (max(loads), batch)


def _decodes(section: Section, rig: Rig, loads: Sequence[tuple[int, int]]) -> None:
    cases = {f"{n}/{b}": {"adapters": n, "batch": b} for n, b in loads}
    section.each(cases, lambda key: _decode(section, rig, *map(int, key.split("/"))), 2.0)


def _decode(section: Section, rig: Rig, num_adapters: int, batch: int) -> None:
    chunks = decodes(rig, num_adapters, batch)
    error = check_step(rig, chunks, some(range(batch), section.size.checked_rows))
    timing, again = (Timing.of(step_seconds(rig, chunks)) for _ in range(2))
    used = len({chunk.adapter.directory for chunk in chunks if chunk.adapter is not None})
    floor = step_floor(
        section.size.model,
        [1] * batch,
        [section.size.context] * batch,
        [RANK] * used,
        {RANK: batch if used else 0},
        DTYPE.itemsize,
    )
    section.add(
        timed(
            section.name,
            {"adapters": num_adapters, "batch": batch},
            timing,
            floor_s=floor.seconds(section.ceilings),
            error=error,
            again=again,
            values={"tokens_per_s": batch / timing.median_s},
        )
    )


def step_seconds(rig: Rig, chunks: Sequence[ChunkInput], between: Callable[[], None] = lambda: None) -> list[float]:
    """From one step's tokens on the host to the next one's, one step in flight, as the engine's loop runs them.

    A step's tokens are drawn by the step before and taken on the device. `between` is called once a step.
    """
    first = rig.runner.forward(tuple(chunks))
    first.draw(draws(chunks, temperature=_TEMPERATURE))
    running, seconds, last_s = first, list[float](), time.perf_counter()
    for step in range(1, rig.size.num_steps):
        following = [
            chunk._replace(token_ids=(), start=chunk.start + step, drawn=number) for number, chunk in enumerate(chunks)
        ]
        submitted = rig.runner.forward(tuple(following))
        if None in running.output().tokens:
            raise WrongOutput(f"no token could be drawn in step {step}")
        submitted.draw(draws(following, temperature=_TEMPERATURE))
        between()
        now_s = time.perf_counter()
        seconds.append(now_s - last_s)
        running, last_s = submitted, now_s
    running.output()
    return seconds[_WARM_UP:] or seconds


def _prefill(section: Section, rig: Rig, rank: int, case: dict[str, object]) -> None:
    """One prompt in one step, its first token drawn."""
    tokens, model = section.size.prefill_tokens, section.size.model
    chunk = ChunkInput(
        token_ids=tuple((17 * index + 3) % model.vocab_size for index in range(tokens)),
        start=0,
        block_table=rig.tables(1, tokens)[0],
        adapter=rig.adapters[rank][0] if rank else None,
    )
    error = check_step(rig, [chunk], [0])

    def once() -> float:
        begin_s = time.perf_counter()
        step = rig.runner.forward((chunk,))
        step.draw(draws([chunk], temperature=_TEMPERATURE))
        step.output()
        return time.perf_counter() - begin_s

    repeats = max(2, min(8, int(_PREFILL_S / once())))
    timing, again = (Timing.of([once() for _ in range(repeats)]) for _ in range(2))
    floor = step_floor(model, [tokens], [tokens], [rank] * bool(rank), {rank: tokens if rank else 0}, DTYPE.itemsize)
    # The base model's operations alone: what an adapter adds is its cost.
    base = step_floor(model, [tokens], [tokens], [], {}, DTYPE.itemsize)
    rate = base.flops / timing.median_s
    section.add(
        timed(
            section.name,
            case,
            timing,
            floor_s=floor.seconds(section.ceilings),
            error=error,
            again=again,
            values={"flops_per_s": rate, "of_matmul": rate / section.ceilings.matmul},
        )
    )


def _copies(section: Section, rig: Rig, case: dict[str, object]) -> None:
    """Adapters copied in from pinned memory, one behind the other, while a batch decodes."""
    batch = max(b for n, b in section.size.decodes if n == 0 and b <= 64)
    chunks = decodes(rig, 0, batch)
    form = rig.forms[RANK]
    used = {page for chunk in chunks for page in chunk.block_table}
    spare = [page for page in rig.free_pages if page not in used]
    targets = [
        spare[first : first + form.num_pages] for first in range(0, len(spare) - form.num_pages + 1, form.num_pages)
    ][: 2 * _COPIES_IN_FLIGHT]
    if not targets:
        raise NotRun(f"no {form.num_pages} pages are left to copy an adapter to")
    shape = (form.num_pages, rig.storage.layout.page_bytes)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, pin_memory=rig.device.type == "cuda")
    image[0].copy_(torch.from_numpy(form.pages[form.places[0]]))  # pyright: ignore[reportUnknownMemberType]
    source = replace(form, pages=image.numpy(), places=tuple(range(form.num_pages)))
    in_flight: deque[AdapterCopy] = deque()
    num_copied = 0

    def top_up() -> None:
        nonlocal num_copied
        while in_flight and in_flight[0].ended:
            in_flight.popleft()
        while len(in_flight) < _COPIES_IN_FLIGHT:
            pages = targets[num_copied % len(targets)]
            in_flight.append(rig.storage.write_adapter(source, pages, wait_for_steps=False))
            num_copied += 1
            if rig.device.type != "cuda":
                break

    step_seconds(rig, chunks)
    alone = Timing.of(step_seconds(rig, chunks))
    begin_s = time.perf_counter()
    beside = Timing.of(step_seconds(rig, chunks, between=top_up))
    while in_flight and not in_flight[-1].ended:
        time.sleep(1e-4)
    rate = num_copied * form.num_pages * rig.storage.layout.page_bytes / (time.perf_counter() - begin_s)
    landed = rig.storage.pages[targets[(num_copied - 1) % len(targets)][-1]]
    if not torch.equal(landed.cpu(), image[-1]):
        raise WrongOutput("the last page copied is not what was sent")
    section.add(
        Record(
            section=section.name,
            case=case,
            median_s=beside.median_s,
            spread=beside.spread,
            error=0.0,
            values={
                "bytes_per_s": rate,
                "of_pinned": rate / section.ceilings.to_device,
                "step_over_alone": beside.median_s / alone.median_s,
            },
        )
    )
