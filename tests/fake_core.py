"""A core without a model: each request's prompt token says how it behaves. Also a factory for an engine process."""

import os
import signal
import time
from dataclasses import dataclass, field

from lorasrv.config import EngineConfig
from lorasrv.errors import QueueFull, UnsupportedModel
from lorasrv.types import (
    EngineInfo,
    EngineRequest,
    EngineStatus,
    Failure,
    FinishReason,
    PoolStats,
    PositionLogprobs,
    Tier,
    TokenDelta,
    Warm,
    Warmed,
)

COUNT = 1  # 0, 1, 2 … up to max_tokens, one a step; sample i begins at 10 i
REFUSE = 2  # `add` raises
FAIL = 3  # one token of each sample, then a failure of all
BREAK = 4  # `step` raises
HANG = 5  # `step` does not return
FOREVER = 6  # counts, and ends only by cancel

INFO = EngineInfo(
    device="cpu", dtype="float32", vocab_size=256, context_tokens=64, block_tokens=16, page_bytes=1024, num_pages=8
)


@dataclass
class FakeCore:
    """Owned by the thread that runs the loop; `step_s` is how long a step takes."""

    step_s: float = 0.0
    requests: dict[str, EngineRequest] = field(default_factory=dict)
    samples: dict[tuple[str, int], int] = field(default_factory=dict)  # how many tokens each running one was sent
    cancelled: list[str | tuple[str, int]] = field(default_factory=list)
    warming: list[int] = field(default_factory=list[int])
    warmed: list[Warmed] = field(default_factory=list[Warmed])
    closed: bool = False

    def add(self, request: EngineRequest) -> None:
        if request.token_ids[0] == REFUSE:
            raise QueueFull("0 requests may wait")
        self.requests[request.request_id] = request
        self.samples |= {(request.request_id, index): 0 for index in range(request.n)}

    def cancel(self, request_id: str, index: int | None = None) -> None:
        self.cancelled.append(request_id if index is None else (request_id, index))
        for key in list(self.samples):
            if key[0] == request_id and index in (None, key[1]):
                self._end(key)

    def warm(self, warm: Warm) -> None:
        """Any other digest is on the device at once. What never is counts as waiting."""
        match warm.digest:
            case "never":
                self.warming.append(warm.warm_id)
            case "damaged":
                failure = Failure(reason="ADAPTER_CORRUPT", message="version damaged: no longer matches its digest")
                self.warmed.append(Warmed(warm_id=warm.warm_id, failure=failure))
            case _:
                self.warmed.append(Warmed(warm_id=warm.warm_id, tier=Tier.DEVICE))

    def cancel_warm(self, warm_id: int) -> None:
        self.warming.remove(warm_id)

    def take_warmed(self) -> tuple[Warmed, ...]:
        ended, self.warmed = tuple(self.warmed), []
        return ended

    def has_work(self) -> bool:
        return bool(self.requests)

    def step(self) -> tuple[TokenDelta, ...]:
        time.sleep(self.step_s)
        return tuple(self._advance(key) for key in list(self.samples) if key in self.samples)

    def status(self) -> EngineStatus:
        pool = PoolStats(num_pages=8, free=8, sequences=0, prefix=0, adapters=0)
        running, waiting = len(self.requests), len(self.warming)
        return EngineStatus(pool=pool, running=running, waiting=waiting, pins=0, adapters=())

    def close(self) -> None:
        self.closed = True

    def _advance(self, key: tuple[str, int]) -> TokenDelta:
        request_id, index = key
        request, sent = self.requests[request_id], self.samples[key]
        kind = request.token_ids[0]
        if kind == BREAK:
            raise RuntimeError("broken on request")
        if kind == HANG:
            time.sleep(3600)
        if kind == FAIL and sent == 1:
            self.cancel(request_id)
            failure = Failure(reason="ADAPTER_LOAD_FAILED", message="adapter abc is damaged")
            return TokenDelta(request_id=request_id, failure=failure)
        self.samples[key] += 1
        finish = None
        if kind == COUNT and sent + 1 == request.max_tokens:
            finish = FinishReason.LENGTH
            self._end(key)
        token_id = 10 * index + sent
        score = (PositionLogprobs(token_id=token_id, logprob=-1.0),)
        return TokenDelta(
            request_id=request_id,
            sample=index,
            token_ids=(token_id,),
            logprobs=() if request.logprobs is None else score,
            prompt_logprobs=() if request.prompt_logprobs is None or index else score,
            finish=finish,
        )

    def _end(self, key: tuple[str, int]) -> None:
        del self.samples[key]
        if all(request_id != key[0] for request_id, _ in self.samples):
            del self.requests[key[0]]


def build(config: EngineConfig) -> tuple[FakeCore, EngineInfo]:
    """The factory of a test's engine process; the model's path says what becomes of it."""
    match config.model.path:
        case "unsupported":
            raise UnsupportedModel("model type 'gpt9' is not served")
        case "defect":
            raise KeyError("secret detail")
        case "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        case "loads-forever":
            time.sleep(3600)
        case once if once.startswith("once:"):
            # The first start works, later ones do not, until the file is gone.
            if os.path.exists(once[5:]):
                raise UnsupportedModel("the model went away")
            open(once[5:], "x").close()
        case _:
            pass
    return FakeCore(step_s=0.002), INFO
