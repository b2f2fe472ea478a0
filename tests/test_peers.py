"""Ours beside peers: who is wrong has no figures, peers get their best settings, and the referee is PEFT."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorasrv_bench import peers, peers_transformers
from lorasrv_bench.asks import Ask
from lorasrv_bench.bench_model import BOS, CONFIGS, FIRST_WORD, tokens_of_text, word, write_model
from lorasrv_bench.peers import Compared, Setup
from lorasrv_bench.peers_arms import Answered, Material
from lorasrv_bench.peers_transformers import PEERS, Models, Referee, Settings, answered, best_settings

SMALL = Setup(size="tiny", concurrency=4, requests=6, prompt_tokens=6, output_tokens=8, rounds=2, seed=3)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return peers.written(tmp_path_factory.mktemp("peers") / "material", SMALL)


@pytest.fixture(scope="module")
def models(material: Material) -> Iterator[Models]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Models(material.model, tuple(material.adapters.values()))
    torch.set_num_threads(before)


def mixed(material: Material) -> list[Ask]:
    return peers.asks_of(SMALL, material, (None, *range(peers.NUM_ADAPTERS)), (0,))


def test_a_text_says_its_tokens(tmp_path: Path) -> None:
    vocab = CONFIGS["125m"]["vocab_size"]
    ids = (FIRST_WORD, FIRST_WORD + 1, FIRST_WORD + 26, vocab - 1)
    assert tokens_of_text("".join(f" {word(each)}" for each in ids)) == ids
    assert len({word(each) for each in range(FIRST_WORD, vocab)}) == vocab - FIRST_WORD
    assert tokens_of_text(" aaaa aaab\ufffd") is None and tokens_of_text(" aaa") is None


def test_greedy_answers_are_words(models: Models, material: Material) -> None:
    for ask in mixed(material):
        assert min(Referee(models).greedy(ask)) >= FIRST_WORD > BOS


def test_models_follow_from_the_seed(tmp_path: Path) -> None:
    files = [
        (write_model(tmp_path / str(number), "tiny", seed) / "model.safetensors").read_bytes()
        for number, seed in enumerate((1, 1, 2))
    ]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("name", PEERS)
def test_peers_answer_as_the_referee_does(name: str, models: Models, material: Material) -> None:
    asks = [ask for ask in mixed(material) if ask.adapter is None or peers.knows(name, peers.MIXED)]
    referee = Referee(models)
    settings = Settings(threads=1, dtype="float32", batch=3)
    assert answered(PEERS[name], models, settings, asks) == [referee.greedy(ask) for ask in asks]


def test_the_referee_tells_weights_and_tokens_apart(models: Models, material: Material) -> None:
    referee = Referee(models)
    for ask in mixed(material):
        said = referee.greedy(ask)
        assert max(referee.gaps(ask, said)) == pytest.approx(0, abs=1e-4)
        for other in (None, *range(peers.NUM_ADAPTERS)):
            if other != ask.adapter:
                assert max(referee.gaps(replace(ask, adapter=other), said)) > peers.TOLERANCE
        changed = (*said[:3], said[3] + 1, *said[4:])
        assert referee.gaps(ask, changed)[3] > 0.01


class Judge:
    """A referee to whom a token is right where it is the request's index plus its place; another is `off` nats off."""

    def __init__(self, off: float = 5.0, blind: bool = False) -> None:
        self._off = off
        self._blind = blind

    def gaps(self, ask: Ask, token_ids: Sequence[int]) -> list[float]:
        shift = 0 if self._blind else (ask.adapter or 0) + 10 * (ask.adapter is None)
        return [0.0 if token == place + shift else self._off for place, token in enumerate(token_ids)]


class FakeArm:
    def __init__(self, wrong_at: int | None = None, cut: int = 0, seconds: float = 2.0) -> None:
        self._wrong_at = wrong_at
        self._cut = cut
        self._seconds = seconds

    def answer(self, asks: Sequence[Ask]) -> Answered:
        answers: list[tuple[int, ...]] = []
        for ask in asks:
            shift = (ask.adapter or 0) + 10 * (ask.adapter is None)
            tokens = [place + shift for place in range(ask.max_tokens - self._cut)]
            if ask.index == self._wrong_at:
                tokens[-1] += 1
            answers.append(tuple(tokens))
        return Answered(tokens=tuple(answers), seconds=self._seconds, bound=("it was late",))


def compared(material: Material, referee: Any, **arms: FakeArm) -> Compared:
    found = Compared(rates={}, wrong={}, bound={}, searched={}, chosen={}, worst_gap={})
    named = {"ours, through gRPC": FakeArm(), **{name.replace("_", " "): arm for name, arm in arms.items()}}
    for number in range(SMALL.rounds + 1):
        peers._round(SMALL, material, named, referee, number, found)
    return found


def test_rounds_behind_the_first_count(material: Material) -> None:
    found = compared(material, Judge(), PEFT_mixed_batch=FakeArm(seconds=4.0))
    assert found.wrong == {}
    assert found.rates["ours, through gRPC"] == dict.fromkeys(peers.CASES, [6 * 8 / 2.0] * 2)
    assert found.rates["PEFT mixed batch"].keys() == {"one adapter", "4 adapters"}, "it is no peer for the base"
    assert found.ratio(peers.OURS, peers.MIXED, "PEFT mixed batch") == [2.0, 2.0]
    assert found.ratio(peers.OURS, "base", "PEFT mixed batch") is None
    told = peers.report(found)
    assert "24 (24 to 24)" in told and "2.00 ×" in told
    assert "CLIENT-BOUND, ours, through gRPC: it was late" in told


@pytest.mark.parametrize(
    ("arm", "judge", "message"),
    [
        (FakeArm(wrong_at=1), Judge(), "request 1: a token is 5 nats from the likeliest"),
        (FakeArm(cut=1), Judge(), "have other than 2 tokens"),
        (FakeArm(), Judge(blind=True), "passes as well under other weights"),
    ],
)
@pytest.mark.parametrize("name", ["other", "ours, through gRPC"])
def test_who_is_wrong_has_no_figures(name: str, arm: FakeArm, judge: Judge, message: str, material: Material) -> None:
    if judge._blind:
        judge = Judge(blind=True, off=0.0)
    found = compared(material, judge, **{name: arm})
    assert message in found.wrong[name][0]
    assert found.median(name, "base") is None and found.ratio(peers.OURS, "base", "other") is None
    assert f"| {name} | NO SCORE" in peers.report(found)


class BrokenArm(FakeArm):
    def answer(self, asks: Sequence[Ask]) -> Answered:
        raise RuntimeError("3 of 6 requests failed: gone")


def test_who_fails_leaves_the_others_their_figures(material: Material) -> None:
    found = compared(material, Judge(), other=BrokenArm())
    assert found.wrong == {"other": ["base, round 0: 3 of 6 requests failed: gone"]}
    assert found.median(peers.OURS, "base") == 24


def test_servers_only_leaves_the_peers_of_this_process_out(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Alone(Judge):
        def greedy(self, ask: Ask) -> tuple[int, ...]:
            return FakeArm().answer([ask]).tokens[0]

    monkeypatch.setattr(peers, "ours", lambda *_: nullcontext({peers.OURS: FakeArm()}))
    monkeypatch.setattr(peers, "Models", lambda *_: None)
    monkeypatch.setattr(peers, "Referee", lambda _: Alone())
    monkeypatch.setattr(peers, "Clients", lambda _: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(peers, "PEERS", {"a peer": None})
    monkeypatch.setattr(peers, "PeerArm", lambda *_: pytest.fail("a peer was asked"))
    monkeypatch.setattr(peers, "best_settings", lambda *_: pytest.fail("a peer was searched"))
    found = peers.measured(replace(SMALL, servers_only=True), material, tmp_path)
    assert found.wrong == {} and found.rates.keys() == {peers.OURS}


def test_the_best_settings_are_found(models: Models, material: Material, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread and half the batch are faster here, float32 is not."""
    now_s = [0.0]
    monkeypatch.setattr(peers_transformers.time, "perf_counter", lambda: now_s[0])
    tried: list[Settings] = []

    def answer(models: Models, settings: Settings, asks: Sequence[Ask]) -> peers_transformers.Tokens:
        if asks[0].max_tokens > 1:
            tried.append(settings)
            slow = settings.threads > 1, settings.dtype == "float32", settings.batch == 4
            now_s[0] += 1.0 + sum(slow)
        return [tuple(range(ask.max_tokens)) for ask in asks]

    torch.set_num_threads(2)
    best, rates = best_settings(answer, models, mixed(material), 4)
    torch.set_num_threads(1)
    assert best == Settings(threads=1, dtype="bfloat16", batch=2)
    assert len(tried) == len(set(tried)) == len(rates) == 4
    assert rates["bfloat16, 1 threads, batch 2"] == max(rates.values())


def test_servers_by_url_need_the_folder_they_were_started_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(["--llama-cpp", "http://127.0.0.1:1"])
    assert "need --folder" in capsys.readouterr().err
