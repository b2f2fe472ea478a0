"""An engine without a model for the streaming benchmark: every running request gets a token per step, at a set pace."""

import random
import time
from collections.abc import Sequence
from pathlib import Path

from lorasrv.config import EngineConfig
from lorasrv.engine.text import load_tokenizer
from lorasrv.types import EngineInfo, EngineRequest, EngineStatus, FinishReason, PoolStats, TokenDelta, Warm, Warmed

DELTAS_PER_S = 45_000
NUM_PAGES = 1 << 16
BLOCK_TOKENS = 16
_WORDS = [
    "Der",
    "Zug",
    "nach",
    "Köln",
    "fährt",
    "über",
    "你好",
    "weiter,",
    "and",
    "🙂",
    "nobody",
    "minds;",
    "η",
    "γάτα",
    "κοιμάται.",
]
_NUM_WORDS = 500


class PacedCore:
    """Owned by the thread that runs the loop. `deltas_per_s` None steps without a pause."""

    def __init__(self, answers: Sequence[int], deltas_per_s: float | None) -> None:
        self._answers = answers
        self._deltas_per_s = deltas_per_s
        self._requests: dict[str, tuple[EngineRequest, int]] = {}
        self._due_s = 0.0

    def add(self, request: EngineRequest) -> None:
        if not self._requests:
            self._due_s = time.monotonic()
        self._requests[request.request_id] = (request, 0)

    def cancel(self, request_id: str, index: int | None = None) -> None:
        self._requests.pop(request_id, None)

    def warm(self, warm: Warm) -> None:
        raise NotImplementedError("this engine has no adapters")

    def cancel_warm(self, warm_id: int) -> None: ...

    def take_warmed(self) -> tuple[Warmed, ...]:
        return ()

    def has_work(self) -> bool:
        return bool(self._requests)

    def step(self) -> tuple[TokenDelta, ...]:
        self._keep_pace()
        deltas: list[TokenDelta] = []
        for request_id, (request, sent) in list(self._requests.items()):
            finish = FinishReason.LENGTH if sent + 1 == request.max_tokens else None
            token_id = answer_token(self._answers, request.seed, sent)
            deltas.append(TokenDelta(request_id=request_id, token_ids=(token_id,), finish=finish))
            if finish is None:
                self._requests[request_id] = (request, sent + 1)
            else:
                del self._requests[request_id]
        return tuple(deltas)

    def status(self) -> EngineStatus:
        pool = PoolStats(num_pages=NUM_PAGES, free=NUM_PAGES, retiring=0, sequences=0, prefix=0, adapters=0)
        return EngineStatus(pool=pool, running=len(self._requests), waiting=0, pins=0, adapters=())

    def close(self) -> None: ...

    def _keep_pace(self) -> None:
        """Sleep until the step is due; steps that come late are made up for."""
        if self._deltas_per_s is not None:
            self._due_s += len(self._requests) / self._deltas_per_s
            time.sleep(max(0.0, self._due_s - time.monotonic()))


def answer_token(answers: Sequence[int], seed: int, position: int) -> int:
    return answers[(seed + position) % len(answers)]


def answers_of(model: str) -> list[int]:
    """What all requests are answered with, each from its own place on: text of characters of one to four bytes."""
    tokenizer = load_tokenizer(Path(model))
    words = random.Random(0).choices(_WORDS, k=_NUM_WORDS)
    return tokenizer.encode(" ".join(words) + " ", add_special_tokens=False).ids


def info_of(model: str) -> EngineInfo:
    return EngineInfo(
        device="none",
        dtype="float32",
        vocab_size=load_tokenizer(Path(model)).get_vocab_size(),
        context_tokens=1 << 15,
        block_tokens=BLOCK_TOKENS,
        page_bytes=1024,
        num_pages=NUM_PAGES,
    )


def build(config: EngineConfig) -> tuple[PacedCore, EngineInfo]:
    """The factory of an engine process that gives DELTAS_PER_S deltas to all requests together."""
    return PacedCore(answers_of(config.model.path), DELTAS_PER_S), info_of(config.model.path)


def build_unpaced(config: EngineConfig) -> tuple[PacedCore, EngineInfo]:
    """One that gives as many as it can."""
    return PacedCore(answers_of(config.model.path), None), info_of(config.model.path)
