"""The eviction benchmark runs on the engine's parts as they are."""

import pytest

from lorasrv_bench import eviction


def test_a_small_run(capsys: pytest.CaptureFixture[str]) -> None:
    eviction.main(["--requests", "60", "--pages", "600", "--workload", "zipf:n=40,s=1,prefix_tokens=64"])
    table = capsys.readouterr().out
    assert all(policy in table for policy in ("drop when idle", "LRU", "LFU", "the engine's"))
