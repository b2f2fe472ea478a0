"""A step's arrays against plain loops, and the same step in arrays that are larger than it."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lorasrv.engine.batch import ChunkInput
from lorasrv.engine.step_arrays import Room, StepPlan, drawn_rows, step_arrays
from lorasrv.memory.residency import AdapterInput
from lorasrv.memory.staging import Staging, num_bytes, views
from peft_models import random_llama
from test_decoder import Rig, chunk

ADAPTERS = (
    None,
    AdapterInput(directory=64, max_rank=3, scale=1.0),
    AdapterInput(directory=128, max_rank=40, scale=0.5),
)


def random_chunks(seed: int) -> list[ChunkInput]:
    rng = random.Random(seed)
    chunks: list[ChunkInput] = []
    for adapter in (ADAPTERS[2], ADAPTERS[1], ADAPTERS[0]):
        for _ in range(rng.randint(0, 3)):
            start, length = rng.randint(0, 30), rng.randint(1, 90)
            pages = tuple(rng.sample(range(50), -(-(start + length) // 4)))
            chunks.append(
                ChunkInput(
                    token_ids=tuple(rng.randrange(99) for _ in range(length)),
                    start=start,
                    block_table=pages,
                    adapter=adapter,
                )
            )
    return chunks or random_chunks(seed + 1000)


@pytest.mark.parametrize("seed", range(20))
def test_every_row_has_its_place(seed: int) -> None:
    chunks = random_chunks(seed)
    plan = StepPlan.of(chunks)
    arrays = step_arrays(plan, plan.room(), 4, 77)
    rows = [(c, c.start + i, c.token_ids[i]) for c in chunks for i in range(c.num_tokens)]
    assert arrays["token_ids"].tolist() == [token for _, _, token in rows]
    assert arrays["positions"].tolist() == [position for _, position, _ in rows]
    assert arrays["slots"].tolist() == [c.block_table[p // 4] * 4 + p % 4 for c, p, _ in rows]
    assert arrays["context_lengths"].tolist() == [c.start + c.num_tokens for c in chunks]
    assert np.diff(arrays["query_starts"]).tolist() == [c.num_tokens for c in chunks]
    for table, c in zip(arrays["block_tables"].tolist(), chunks, strict=True):
        assert tuple(table[: len(c.block_table)]) == c.block_table
    by_row = {row: adapter for start, end, adapter in plan.segments for row in range(start, end)}
    assert [by_row.get(row) for row in range(len(rows))] == [c.adapter for c, _, _ in rows]
    assert len(plan.segments) == len({c.adapter for c in chunks} - {None})


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_room_only_adds_behind(seed: int) -> None:
    chunks = random_chunks(seed)
    plan = StepPlan.of(chunks)
    room = plan.room()
    larger = Room(
        num_tokens=room.num_tokens + 7,
        num_sequences=room.num_sequences + 3,
        max_blocks=room.max_blocks + 2,
        num_segments=room.num_segments + 1,
        num_row_blocks=room.num_row_blocks + 5,
        num_rank_blocks=room.num_rank_blocks + 5,
    )
    exact, padded = (step_arrays(plan, each, 4, 77) for each in (room, larger))
    for name, array in exact.items():
        assert np.array_equal(padded[name][tuple(slice(0, size) for size in array.shape)], array), name
    assert set(padded["slots"][room.num_tokens :].tolist()) == {77 * 4}
    assert set(padded["query_starts"][room.num_sequences :].tolist()) == {room.num_tokens}
    assert not padded["context_lengths"][room.num_sequences :].any()
    behind = slice(room.num_segments, None)
    assert np.array_equal(padded["ends"][behind], padded["starts"][behind])


def test_arrays_of_nothing_can_be_captured() -> None:
    room = Room(num_tokens=4, num_sequences=4, max_blocks=2, num_segments=4, num_row_blocks=4, num_rank_blocks=8)
    arrays = step_arrays(StepPlan.of(()), room, 4, 77)
    assert arrays["slots"].tolist() == [77 * 4] * 4
    assert arrays["work_counts"].tolist() == [0, 0]
    assert not arrays["context_lengths"].any() and not arrays["query_starts"].any()


def test_tokens_that_the_device_still_draws() -> None:
    known = ChunkInput(token_ids=(1, 2), start=0, block_table=(0,), adapter=None)
    drawn = ChunkInput(token_ids=(), start=5, block_table=(1, 2), adapter=None, drawn=3)
    found = drawn_rows([known, drawn, known, drawn])
    assert found["rows"].tolist() == [2, 5]
    assert found["places"].tolist() == [3, 3]


def test_uploads_lie_where_their_shapes_say() -> None:
    arrays = {
        "ids": np.arange(5, dtype=np.int64),
        "none": np.empty((0, 4), dtype=np.int32),
        "table": np.arange(6, dtype=np.int32).reshape(2, 3),
        "scales": np.array([0.5], dtype=np.float32),
    }
    staging, buffer = Staging(torch.device("cpu")), torch.full((num_bytes(arrays) + 8,), 7, dtype=torch.uint8)
    before = views(arrays, buffer)
    for _ in range(6):
        arrays["ids"] += 1
        after = staging.upload(arrays, buffer)
        for name, array in arrays.items():
            assert before[name].data_ptr() == after[name].data_ptr()
            assert np.array_equal(after[name].numpy(), array), name
    assert set(buffer[num_bytes(arrays) :].tolist()) == {7}


def test_rows_that_fill_up_a_step_change_none_of_its_own(tmp_path: Path) -> None:
    """A decode step behind three prompts, in arrays for eight: the same logits, and no page but its own is written."""
    random_llama(tmp_path)
    rig = Rig(tmp_path)
    generator = random.Random(0)
    texts = [[generator.randrange(99) for _ in range(length)] for length in (5, 17, 9)]
    tables = [rig.table(len(text)) for text in texts]
    for text, table in zip(texts, tables, strict=True):
        rig.logits(rig.runner.build_batch([chunk(text, 0, len(text) - 1, table)]))
    step = [chunk(text, len(text) - 1, len(text), table) for text, table in zip(texts, tables, strict=True)]
    before = rig.storage.bytes.clone()
    want = rig.logits(rig.runner.build_batch(step))
    written = rig.storage.bytes.clone()
    rig.storage.bytes.copy_(before)
    room = Room(num_tokens=8, num_sequences=8, max_blocks=12)
    static = rig.runner.static_step(room, torch.full((8, 12), 10**6, dtype=torch.int32))
    rig.runner.load(static, StepPlan.of(step))
    torch.testing.assert_close(rig.logits(static.batch)[:3], want, atol=1e-4, rtol=0)  # a product of another shape
    kv, scratch = rig.storage.kv, rig.storage.scratch_page
    torch.testing.assert_close(
        kv[:scratch], written.view(kv.dtype).view_as(kv)[:scratch], atol=1e-4, rtol=0, equal_nan=True
    )
    changed = (rig.storage.bytes != before).view_as(rig.storage.pages).any(1).nonzero().squeeze(1).tolist()
    assert set(changed) == {scratch, *(table[-1] for table in tables)}
