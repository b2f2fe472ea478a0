"""Every kind of step once, before the first request, so that nothing is compiled behind READY."""

from collections.abc import Iterator

from lorasrv.engine.batch import ChunkInput, Draw, SampleInput
from lorasrv.engine.runner import ModelRunner
from lorasrv.memory.residency import AdapterInput
from lorasrv.memory.storage import PageStorage
from lorasrv.memory.tensors import pack_adapter
from lorasrv.model.logit_edits import LogitEdits
from lorasrv_kernels.work import DECODE_HEIGHT, PREFILL_HEIGHT

# Long enough that its keys are cut, with a run of rows that takes blocks of either height.
_CONTEXT = 1024


def warm_up(
    runner: ModelRunner,
    storage: PageStorage,
    module_shapes: tuple[tuple[str, int, int], ...],
    context_tokens: int,
    max_rank: int,
) -> None:
    """The pool is nobody's yet: an adapter that leaves every module alone stands in the first page, KV in others."""
    packed = pack_adapter((), storage.layout, module_shapes)
    directory = storage.write_adapter(packed, list(range(packed.num_pages)), wait_for_steps=False).directory
    tokens = min(_CONTEXT, context_tokens, (storage.num_pages - packed.num_pages) * storage.layout.block_tokens)
    table = tuple(range(packed.num_pages, packed.num_pages + storage.layout.pages_for_tokens(tokens)))
    # The widest steps of rank rows differ from one block on.
    for rank in (None, 1, min(max_rank, 17), max_rank):
        adapter = None if rank is None else AdapterInput(directory=directory, max_rank=rank, scale=1.0)
        for chunks in _steps(table, tokens, adapter):
            for how in _draws():
                # Alone: what one row asks for is computed for all that are drawn with it.
                step = runner.forward(chunks)
                step.draw((Draw(chunk=0, how=how),))
                step.output()


def _steps(table: tuple[int, ...], tokens: int, adapter: AdapterInput | None) -> Iterator[tuple[ChunkInput, ...]]:
    """A prompt, chunks of it, a chunk beside a decode row, decode rows."""
    few, many = min(DECODE_HEIGHT, tokens), min(2 * PREFILL_HEIGHT, tokens)
    for lengths in ((tokens,), (many,), (few,), (few, 1), (1, 1)):
        yield tuple(
            ChunkInput(token_ids=(0,) * length, start=tokens - length, block_table=table, adapter=adapter)
            for length in lengths
        )


def _draws() -> Iterator[SampleInput]:
    plain = SampleInput(temperature=1.0, top_p=1.0, top_k=None, seed=0, position=0)
    edits = LogitEdits(repeated=(0,), repetition_penalty=1.1, added=((0, 1.0),), masked=(1,))
    yield from (plain, plain._replace(temperature=0.0), plain._replace(edits=edits, logprobs=2))
    # A kernel of its own each: cut by neighbours in order of probability, by the largest one, by both.
    yield from (plain._replace(top_p=0.9), plain._replace(min_p=0.1), plain._replace(top_k=5, min_p=0.1))
