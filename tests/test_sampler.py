"""Rows of one batch, each as it would be alone; log-probabilities; known answers of the generator."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from drawing import draw, position_logprobs, sample_tokens
from lorasrv.engine.batch import SampleInput
from lorasrv.model import sampler
from lorasrv.model.logit_edits import LogitEdits
from lorasrv_kernels.reference import philox

LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.5, 1.7, -3.0, 0.0, 1.2, 0.5, -0.4, 1.69])


def row(**settings: Any) -> SampleInput:
    defaults: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": None, "seed": 0, "position": 0}
    return SampleInput(**(defaults | settings))


EDITS = [
    LogitEdits(repetition_penalty=1.7, repeated=(0, 1, 2, 5)),
    LogitEdits(repetition_penalty=0.5, repeated=(1, 4)),
    LogitEdits(added=((0, -1.5), (3, 0.75), (9, 2.0))),
    LogitEdits(masked=(0, 10)),
    LogitEdits(repetition_penalty=2.0, repeated=(0, 5, 7), added=((0, 1.0), (5, 2.0), (6, -0.5)), masked=(4,)),
]


def test_rows_without_edits_keep_their_bits_and_their_tokens() -> None:
    logits = batch_logits(60)
    plain = [row(temperature=1.1, top_p=0.9, seed=index, position=index) for index in range(60)]
    with_mates = [
        row(
            temperature=1.1,
            top_p=0.9,
            seed=index,
            position=index,
            min_p=0.1,
            logprobs=3,
            edits=LogitEdits(repetition_penalty=1.5, repeated=(1, 2, index), added=((3, 5.0),), masked=(4,)),
        )
        if index % 2
        else plain[index]
        for index in range(60)
    ]
    among = logits.clone()
    tokens, logprobs = draw(among, with_mates)
    assert torch.equal(among[::2], logits[::2])
    assert tokens[::2] == sample_tokens(logits, plain)[::2]
    assert sorted(logprobs) == list(range(1, 60, 2))
    alone = [draw(logits[index : index + 1].clone(), with_mates[index : index + 1]) for index in range(60)]
    assert tuple(found[0][0] for found in alone) == tokens
    assert {index: found[1][0] for index, found in enumerate(alone) if found[1]} == logprobs


def test_logprobs_are_the_models_own_whatever_is_edited() -> None:
    logits = batch_logits(6)
    rows = [row(temperature=3.0, seed=index, edits=EDITS[index % 5], logprobs=index) for index in range(5)]
    rows.append(row(logprobs=2))
    logits[5, 7] = float("nan")
    want = logits.double().log_softmax(-1)
    tokens, found = draw(logits.clone(), rows)
    assert sorted(found) == [0, 1, 2, 3, 4] and tokens[5] is None
    for index, each in found.items():
        assert each.token_id == tokens[index]
        assert each.logprob == pytest.approx(want[index, each.token_id].item(), abs=1e-5)
        best = want[index].topk(index)
        assert [token for token, _ in each.top] == best.indices.tolist()
        assert [logprob for _, logprob in each.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_more_logprobs_than_tokens_are_all() -> None:
    (found,) = position_logprobs(torch.tensor([[0.0, 1.0, -1.0]]), [2], 20)
    assert [token for token, _ in found.top] == [1, 0, 2]
    assert sum(math.exp(logprob) for _, logprob in found.top) == pytest.approx(1)
    assert position_logprobs(torch.zeros(0, 3), [], 2) == ()


def test_a_fully_masked_row_is_none_and_its_neighbour_is_not() -> None:
    rows = [row(edits=LogitEdits(masked=(0, 1, 2))), row()]
    tokens = sample_tokens(torch.zeros(2, 3), rows)
    assert tokens[0] is None and tokens[1] is not None


def test_temperature_zero_takes_the_largest_and_of_equal_ones_the_first() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-1.0, -2.0, -0.5, -0.6]])
    assert sample_tokens(logits, [row(temperature=0.0, seed=seed) for seed in (1, 2, 3)]) == (1, 0, 2)


def test_equal_logits_at_the_border_keep_the_lowest_ids() -> None:
    """Tokens 2, 3 and 8 are equal and rank 5 to 7: top_k 5 keeps token 2 of them."""
    rows = [row(top_k=5, temperature=5.0, seed=seed) for seed in range(2000)]
    assert set(sample_tokens(LOGITS.expand(2000, -1), rows)) == {0, 4, 10, 7, 2}


def test_top_k_one_and_a_tiny_top_p_are_greedy() -> None:
    rows = [row(top_k=1, seed=seed) for seed in range(50)] + [row(top_p=1e-9, seed=seed) for seed in range(50)]
    assert set(sample_tokens(LOGITS.expand(100, -1), rows)) == {0}


def batch_logits(num_rows: int) -> Tensor:
    return torch.randn(num_rows, 333, generator=torch.Generator().manual_seed(7)) * 2


def test_a_row_draws_the_same_whatever_else_is_in_the_batch() -> None:
    logits = batch_logits(40)
    rows = [
        row(
            temperature=(0.0, 0.7, 1.0, 1.5)[i % 4],
            top_p=(1.0, 0.9)[i % 2],
            top_k=(None, 20, 5)[i % 3],
            seed=i // 2,
            position=i,
        )
        for i in range(40)
    ]
    together = sample_tokens(logits, rows)
    assert len(set(together)) > 10
    assert tuple(sample_tokens(logits[i : i + 1], [rows[i]])[0] for i in range(40)) == together
    backwards = list(reversed(range(40)))
    assert sample_tokens(logits[backwards], [rows[i] for i in backwards]) == tuple(reversed(together))


def test_seed_sample_and_position_matter_to_the_last_bit() -> None:
    logits = torch.zeros(1, 1 << 14)
    seeds = (0, 1, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1)
    drawn = {
        sample_tokens(logits, [row(seed=seed, position=at, sample=number)])[0]
        for seed in seeds
        for at in range(4)
        for number in range(3)
    }
    assert len(drawn) == 72


@pytest.mark.parametrize(
    "bad", [[float("nan"), 1.0, 2.0], [float("-inf")] * 3, [float("inf"), 0.0, 0.0], [0.0, 0.0, float("nan")]]
)
def test_a_row_that_is_not_finite_is_none_and_its_neighbours_are_as_before(bad: list[float]) -> None:
    logits = torch.tensor([[0.0, 1.0, 0.5], bad, [0.3, 0.2, 0.1], bad])
    rows = [row(seed=1), row(seed=2, top_p=0.5), row(temperature=0.0), row(temperature=0.0)]
    got = sample_tokens(logits, rows)
    assert (got[1], got[3]) == (None, None)
    assert (got[0], got[2]) == sample_tokens(logits[[0, 2]], [rows[0], rows[2]])


def test_a_masked_token_is_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0]]).expand(500, -1)
    assert set(sample_tokens(logits, [row(temperature=2.0, seed=seed) for seed in range(500)])) == {1, 3}


def test_a_tiny_temperature_is_greedy_and_not_nan() -> None:
    rows = [row(temperature=1e-38, top_p=(1.0, 0.5)[seed % 2], seed=seed) for seed in range(20)]
    assert set(sample_tokens(LOGITS.flip(0).expand(20, -1), rows)) == {len(LOGITS) - 1}


def test_a_tiny_temperature_draws_evenly_among_equals() -> None:
    rows = [row(temperature=1e-30, seed=seed) for seed in range(400)]
    drawn = sample_tokens(torch.tensor([1.0, 3.0, 3.0]).expand(400, -1), rows)
    assert set(drawn) == {1, 2} and 150 < drawn.count(1) < 250


@pytest.mark.parametrize(
    ("counter", "key", "want"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], want: tuple[int, ...]
) -> None:
    """Known answers of Random123, philox4x32 with 10 rounds."""
    assert tuple(int(word) for word in philox(counter, key)) == want


def test_philox_takes_numbers_beside_tensors_of_another_device() -> None:
    quads, rows = torch.arange(5, device="meta"), torch.zeros(3, 1, dtype=torch.int64, device="meta")
    for word in philox((quads, rows, rows, 0), (rows, rows)):
        assert word.device.type == "meta" and word.shape == (3, 5)


@pytest.mark.parametrize("vocab_size", [50, 333])
def test_nothing_waits_for_the_device(vocab_size: int) -> None:
    """On a device whose tensors have no values: whatever asks for one raises."""
    edits = LogitEdits(repetition_penalty=2.0, repeated=(0, 5, 7), added=((0, 1.0), (5, 2.0)), masked=(4,))
    rows = [
        row(
            temperature=(0.0, 0.7)[i % 2],
            top_p=(1.0, 0.9)[i // 2 % 2],
            top_k=(None, 20)[i // 4 % 2],
            min_p=0.1 * (i % 3),
        )
        for i in range(12)
    ]
    rows += [row(logprobs=3, edits=edits), row(logprobs=0), row(logprobs=3, temperature=0.0)]
    logits = torch.empty(len(rows), vocab_size, device="meta")
    with pytest.raises(NotImplementedError, match="nonzero"):
        (logits > 0).nonzero()
    drawn = sampler.draw(logits, rows)
    assert drawn.tokens.shape == (len(rows),) and drawn.tokens.device.type == "meta"
