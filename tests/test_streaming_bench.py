"""The streaming benchmark measures what it says, and no speed of wrong output."""

import subprocess
import sys
from dataclasses import replace

import pytest

from fake_engine import BASE_MODEL
from lorasrv_bench import streaming
from lorasrv_bench.streaming import Expected, Setup, WrongOutput
from running_server import subprocess_env

SETUP = Setup(model=str(BASE_MODEL), streams=3, tokens=100, clients=2, repeats=1, seed=5, paced=False)


def test_streams_differ_and_hold_characters_of_every_length() -> None:
    texts = list(Expected(replace(SETUP, streams=256)).texts.values())
    assert len(set(texts)) == 256
    assert {len(character.encode()) for character in "".join(texts)} == {1, 2, 3, 4}


def test_a_wrong_token_or_character_is_refused() -> None:
    expected = Expected(SETUP)
    expected.check(dict(expected.tokens), dict(expected.texts))
    seed = expected.seeds[1]
    with pytest.raises(WrongOutput, match="tokens"):
        expected.check(expected.tokens | {seed: expected.tokens[seed][:-1]}, expected.texts)
    with pytest.raises(WrongOutput, match="text"):
        expected.check(expected.tokens, expected.texts | {seed: expected.texts[seed].replace("Zug", "zug")})


@pytest.mark.parametrize("paced", [False, True])
def test_a_round_in_process_is_checked(paced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = replace(SETUP, paced=paced)
    expected = Expected(setup)
    assert streaming._loop_round(setup, expected).tokens_per_s > 0
    assert streaming._desk_round(setup, expected).num_messages >= 3 * setup.streams
    monkeypatch.setattr("lorasrv_bench.stream_core.answer_token", lambda answers, seed, position: answers[0])
    for way in (streaming._loop_round, streaming._desk_round):
        with pytest.raises(WrongOutput):
            way(setup, expected)


@pytest.mark.slow
def test_a_whole_run() -> None:
    options = ["--streams", "3", "--tokens", "20", "--clients", "2", "--repeats", "1", "--unpaced"]
    command = [sys.executable, "-m", "lorasrv_bench.streaming", *options]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=subprocess_env())
    assert result.stdout.startswith("commit ")
    assert "seed=0" in result.stdout
    assert "grpc / loop" in result.stdout
