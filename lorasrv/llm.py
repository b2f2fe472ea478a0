"""The offline face: the engine in this process, for scripts, notebooks and tests. One thread at a time."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from tokenizers import Tokenizer

from lorasrv.config import DType, EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
from lorasrv.engine.admission import TokenLimits, check_request, engine_request
from lorasrv.engine.build import assemble
from lorasrv.engine.fitting import page_check
from lorasrv.engine.output import OutputStream
from lorasrv.engine.text import load_tokenizer
from lorasrv.errors import InvalidRequest, error_from_reason
from lorasrv.memory.packing import PackedAdapter
from lorasrv.model.base_shapes import base_shapes
from lorasrv.requests import AdapterRef, GenerationRequest
from lorasrv.types import (
    BASE_ID,
    AdapterUse,
    EngineRequest,
    EngineStatus,
    FinishReason,
    PositionLogprobs,
    SamplingParams,
    TokenDelta,
)
from lorasrv_adapters.published import open_folder

DEFAULT_POOL_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One prompt's output. `version_digest` None is the base model; `seed` repeats it.

    `stop` is the stop string or stop token id that ended it. `logprobs` has one for each token, `prompt_logprobs` one
    for each prompt token but the first; None where the sampling did not ask.
    """

    text: str
    token_ids: tuple[int, ...]
    finish: FinishReason
    stop: str | int | None
    prompt_tokens: int
    version_digest: str | None
    seed: int
    logprobs: tuple[PositionLogprobs, ...] | None = None
    prompt_logprobs: tuple[PositionLogprobs, ...] | None = None


class LLM:
    """A base model and adapters, served in this process.

        with LLM("path/to/base") as llm:
            llm.add_adapter("support", "path/to/peft_folder")
            for output in llm.generate(["Hello", "Hi"], adapter=["support", "base"]):
                print(output.text)

    Raises UnsupportedModel or ConfigurationError when the model or the settings cannot be served.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: DType = "float32",
        device: str = "cpu",
        dummy_weights: bool = False,
        deterministic: bool = False,
        pool_bytes: int = DEFAULT_POOL_BYTES,
        scheduler: SchedulerConfig | None = None,
    ) -> None:
        config = EngineConfig(
            model=ModelConfig(
                path=str(model), dtype=dtype, device=device, dummy_weights=dummy_weights, deterministic=deterministic
            ),
            pool=PoolConfig(pool_bytes=pool_bytes),
            scheduler=scheduler or SchedulerConfig(),
        )
        self._tokenizer = load_tokenizer(Path(model))
        self._base = base_shapes(model, dtype)
        self._max_rank = config.max_rank
        self._check = page_check(config)
        self._images: dict[str, PackedAdapter] = {}
        assembly = assemble(config, lambda digest, _: self._images[digest])
        self._core, self._packer = assembly.core, assembly.packer
        self._limits = TokenLimits.of(assembly.info)
        self._max_queued = config.scheduler.max_waiting
        self._digests: dict[str, str] = {}
        self._num_requests = 0

    def add_adapter(self, name: str, folder: str | Path) -> str:
        """Validate a PEFT folder and serve it as `name`, instead of what that name meant before. Returns its digest.

        Raises lorasrv_adapters.errors.ContentRefused with every reason, and InvalidRequest for the name `base`.
        """
        if name == BASE_ID:
            raise InvalidRequest("name", f"{BASE_ID!r} is the base model's")
        files = open_folder(Path(folder), self._base, self._max_rank, self._check)
        self._images[files.digest] = self._packer.pack(files)
        self._digests[name] = files.digest
        self._drop_unnamed()
        return files.digest

    def remove_adapter(self, name: str) -> None:
        """Raises InvalidRequest for an unknown name."""
        if name not in self._digests:
            raise InvalidRequest("adapter", f"{name!r} is not loaded")
        del self._digests[name]
        self._drop_unnamed()

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        adapter: str | Sequence[str] = BASE_ID,
        scale: float | None = None,
        sampling: SamplingParams | None = None,
    ) -> list[Generation]:
        """Generate for all prompts in one continuous batch; outputs in the prompts' order.

        `adapter` is one name for all prompts or one for each; `scale` multiplies the adapters' own. Raises
        InvalidRequest before anything runs; an error of a single request ends the call.
        """
        names = [adapter] * len(prompts) if isinstance(adapter, str) else list(adapter)
        if len(names) != len(prompts):
            raise InvalidRequest("adapter", f"{len(names)} adapters for {len(prompts)} prompts")
        params = sampling or SamplingParams()
        runs = [
            _Run(self._request(prompt, name, scale, params), params.stop, self._tokenizer)
            for prompt, name in zip(prompts, names, strict=True)
        ]
        try:
            self._run(runs)
        finally:
            for run in runs:
                self._core.cancel(run.request.request_id)
        return [run.result() for run in runs]

    def status(self) -> EngineStatus:
        return self._core.status()

    def close(self) -> None:
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _request(
        self, prompt: str | Sequence[int], name: str, scale: float | None, sampling: SamplingParams
    ) -> EngineRequest:
        given = prompt if isinstance(prompt, str) else tuple(prompt)
        ref = check_request(
            GenerationRequest(
                tenant="", adapters=(AdapterRef(name=name, scale=scale),), prompt=given, sampling=sampling
            )
        )
        token_ids = tuple(self._tokenizer.encode(given).ids) if isinstance(given, str) else given
        self._num_requests += 1
        return engine_request(
            str(self._num_requests), token_ids, adapter=self._use(ref), sampling=sampling, limits=self._limits
        )

    def _drop_unnamed(self) -> None:
        """Forget the images that no name means any more; no request runs between calls."""
        named = set(self._digests.values())
        self._images = {digest: image for digest, image in self._images.items() if digest in named}

    def _use(self, ref: AdapterRef) -> AdapterUse | None:
        if ref.name == BASE_ID:
            return None
        if ref.name not in self._digests:
            raise InvalidRequest("adapter", f"{ref.name!r} is not loaded")
        return AdapterUse(digest=self._digests[ref.name], scale=1.0 if ref.scale is None else ref.scale)

    def _run(self, runs: list["_Run"]) -> None:
        by_id = {run.request.request_id: run for run in runs}
        queued = deque(runs)
        while queued or self._core.has_work():
            while queued and self._core.status().waiting < self._max_queued:
                self._core.add(queued.popleft().request)
            for delta in self._core.step():
                run = by_id[delta.request_id]
                run.take(delta)
                if run.finish is not None and delta.finish is None:
                    self._core.cancel(delta.request_id)


class _Run:
    """One prompt on its way."""

    def __init__(self, request: EngineRequest, stop: tuple[str, ...], tokenizer: Tokenizer) -> None:
        self.request = request
        self.finish: FinishReason | None = None
        self._output = OutputStream(tokenizer, request, stop)
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self._prompt_logprobs: list[PositionLogprobs] = []
        self._stop: str | int | None = None

    def take(self, delta: TokenDelta) -> None:
        if delta.failure is not None:
            raise error_from_reason(delta.failure.reason, delta.failure.message)
        piece = self._output.take(delta)
        self._pieces.append(piece.text)
        self._token_ids += piece.token_ids
        self._logprobs += piece.logprobs
        self._prompt_logprobs += delta.prompt_logprobs
        self.finish, self._stop = piece.finish, piece.stop

    def result(self) -> Generation:
        assert self.finish is not None, f"request {self.request.request_id} has not ended"
        adapter = self.request.adapter
        return Generation(
            text="".join(self._pieces),
            token_ids=tuple(self._token_ids),
            finish=self.finish,
            stop=self._stop,
            prompt_tokens=len(self.request.token_ids),
            version_digest=adapter.digest if adapter else None,
            seed=self.request.seed,
            logprobs=None if self.request.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=None if self.request.prompt_logprobs is None else tuple(self._prompt_logprobs),
        )
