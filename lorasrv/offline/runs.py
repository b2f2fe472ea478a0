"""One request on its way: its deltas become samples."""

from collections import deque

from lorasrv.engine.output import OutputStream
from lorasrv.engine.vocabulary import Vocabulary
from lorasrv.errors import LorasrvError, error_from_reason
from lorasrv.offline.results import Delta, Generation, Sample
from lorasrv.types import EngineRequest, FinishReason, PositionLogprobs, TokenDelta


class Run:
    """Changed under the driver's lock alone. `deltas` is what a stream has not given out yet, None for a request that
    nobody streams. `ended` says that nothing follows, for whatever reason.
    """

    def __init__(
        self, request: EngineRequest, stop: tuple[str, ...], vocabulary: Vocabulary, *, streamed: bool = False
    ) -> None:
        self.request = request
        self.deltas: deque[Delta] | None = deque() if streamed else None
        self.num_tokens = 0
        self.ended = False
        self._stop = stop
        self._vocabulary = vocabulary
        self._samples: dict[int, _SampleRun] = {}
        self._num_finished = 0
        self._prompt_logprobs: list[PositionLogprobs] = []
        self.error: LorasrvError | None = None

    @property
    def complete(self) -> bool:
        """It ended by itself, with all samples or an error."""
        return self.error is not None or self._num_finished == self.request.n

    @property
    def text(self) -> str:
        """What sample 0 has so far."""
        return "".join(self._samples[0].pieces) if 0 in self._samples else ""

    def take(self, delta: TokenDelta) -> bool:
        """True when the sample ended here and the engine does not know it yet."""
        if delta.failure is not None:
            self.error = error_from_reason(delta.failure.reason, delta.failure.message)
            self.ended = True
            self._samples.clear()
            return False
        if delta.sample not in self._samples:
            self._samples[delta.sample] = _SampleRun(OutputStream(self._vocabulary, self.request, self._stop))
        sample = self._samples[delta.sample]
        if sample.finish is not None:
            return False  # computed before the engine knew
        self._prompt_logprobs += delta.prompt_logprobs
        given = sample.take(delta)
        self.num_tokens += len(given.token_ids)
        if self.deltas is not None and (given.text or given.token_ids or given.finish is not None):
            self.deltas.append(given)
        if given.finish is None:
            return False
        self._num_finished += 1
        self.ended = self.complete
        return delta.finish is None

    def result(self) -> Generation:
        """Of a request that ended by itself."""
        request = self.request
        assert self.complete, f"{request.request_id} has not ended by itself"
        return Generation(
            samples=tuple(
                self._samples[index].result(with_logprobs=request.logprobs is not None)
                for index in sorted(self._samples)
            ),
            prompt_tokens=len(request.token_ids),
            version_digest=request.adapter.digest if request.adapter else None,
            seed=request.seed,
            prompt_logprobs=None if request.prompt_logprobs is None else tuple(self._prompt_logprobs),
            error=self.error,
        )


class _SampleRun:
    def __init__(self, output: OutputStream) -> None:
        self.pieces: list[str] = []
        self.finish: FinishReason | None = None
        self._output: OutputStream | None = output
        self._token_ids: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self._stop: str | int | None = None

    def take(self, delta: TokenDelta) -> Delta:
        assert self._output is not None
        piece = self._output.take(delta)
        self.pieces.append(piece.text)
        self._token_ids += piece.token_ids
        self._logprobs += piece.logprobs
        self.finish, self._stop = piece.finish, piece.stop
        if piece.finish is not None:
            self._output = None  # it is larger than all the rest, and a call may hold 100,000
        return Delta(
            index=delta.sample,
            text=piece.text,
            token_ids=piece.token_ids,
            logprobs=piece.logprobs,
            finish=piece.finish,
            stop=piece.stop,
        )

    def result(self, *, with_logprobs: bool) -> Sample:
        assert self.finish is not None
        return Sample(
            text="".join(self.pieces),
            token_ids=tuple(self._token_ids),
            finish=self.finish,
            stop=self._stop,
            logprobs=tuple(self._logprobs) if with_logprobs else None,
        )
