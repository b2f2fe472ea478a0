"""The offline face: the engine in this process, for scripts, notebooks and training loops."""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

from torch import Tensor
from tqdm.auto import tqdm

from lorasrv.config import DType, EngineConfig, ModelConfig, PoolConfig, SchedulerConfig
from lorasrv.engine.admission import TokenLimits
from lorasrv.engine.build import assemble
from lorasrv.engine.chat import load_chat_template
from lorasrv.engine.defaults import adapter_check, read_defaults
from lorasrv.engine.packer import Packer
from lorasrv.engine.text import load_tokenizer
from lorasrv.errors import AdapterLoadFailed, InvalidRequest
from lorasrv.memory.packing import PackedAdapter
from lorasrv.model.base_shapes import base_shapes
from lorasrv.offline.driver import Driver
from lorasrv.offline.live_adapter import LiveConfig, adapter_files
from lorasrv.offline.prompts import Ask, Conversation, Prompt, RunMaker, as_chat, is_conversation, make_asks
from lorasrv.offline.results import Delta, Generation, Sample
from lorasrv.offline.runs import Run
from lorasrv.offline.stream import Stream
from lorasrv.offline.versions import Version, Versions
from lorasrv.types import BASE_ID, EngineStatus, SamplingParams
from lorasrv_adapters.published import AdapterFiles, open_bytes, open_folder

__all__ = ["LLM", "Delta", "Generation", "Sample", "Stream"]

DEFAULT_POOL_BYTES = 256 << 20


class LLM:
    """A base model and adapters, served in this process.

        with LLM("path/to/base") as llm:
            llm.add_adapter("support", "path/to/peft_folder")
            for output in llm.generate(["Hello", "Hi"], adapter=["support", "base"]):
                print(output.text)

    Nothing runs but while a method does: no thread and no event loop is needed or disturbed. Calls from several threads
    take turns, step by step, and are served in one batch. Ctrl-C ends a call between two steps; what it held is given
    back, and the next call can come.

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
        self._config = EngineConfig(
            model=ModelConfig(
                path=str(model), dtype=dtype, device=device, dummy_weights=dummy_weights, deterministic=deterministic
            ),
            pool=PoolConfig(pool_bytes=pool_bytes),
            scheduler=scheduler or SchedulerConfig(),
        )
        tokenizer = load_tokenizer(Path(model))
        self._base = base_shapes(model, dtype)
        self._check = adapter_check(self._config)
        self._versions = versions = Versions()

        def read(digest: str, _: Packer) -> PackedAdapter:
            version = versions.find(digest)
            if version is None:
                raise AdapterLoadFailed("it is not loaded any more")
            return version.image

        assembly = assemble(self._config, read)
        self._packer = assembly.packer
        limits = self._config.scheduler
        # Enough for the scheduler to look ahead; the core's queue is never full for the lack of patience.
        max_open = min(limits.max_waiting, limits.max_running + limits.lookahead)
        self._driver = Driver(assembly.core, versions, max_open)
        self._maker = RunMaker(tokenizer, load_chat_template(Path(model)), TokenLimits.of(assembly.info))

    def add_adapter(
        self,
        name: str,
        source: str | Path | Mapping[str, Tensor],
        config: LiveConfig | Mapping[str, Any] | None = None,
    ) -> str:
        """Serve an adapter as `name`, instead of what that name meant before. Returns its digest.

        `source` is a PEFT folder, or the state dict of a live PEFT model with the model's LoraConfig (or its
        `to_dict()`):

            llm.add_adapter("policy", get_peft_model_state_dict(model), model.peft_config["default"])

        The weights are copied: training may go on. The same content has the same digest. What runs keeps its version to
        its end; a version that no name means and no request uses is forgotten everywhere.

        Raises lorasrv_adapters.errors.ContentRefused with every reason, and InvalidRequest for the name `base`.
        """
        if name == BASE_ID:
            raise InvalidRequest("name", f"{BASE_ID!r} is the base model's")
        files = self._read(source, config)
        version = self._versions.find(files.digest)
        if version is None:
            image, defaults = self._packer.pack(files), read_defaults(files.spec.serving)
            version = Version(digest=files.digest, image=image, defaults=defaults)
        self._driver.publish(name, version)
        return files.digest

    def remove_adapter(self, name: str) -> None:
        """Requests that run keep their version. Raises InvalidRequest for an unknown name."""
        self._driver.unpublish(name)

    def generate(
        self,
        prompts: str | Sequence[Prompt],
        *,
        adapter: str | Sequence[str] = BASE_ID,
        scale: float | Sequence[float | None] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
    ) -> list[Generation]:
        """Generate for all prompts, texts or lists of token ids, in one batch; outputs are in the prompts' order.

        `adapter`, `scale`, which multiplies the adapter's own, and `sampling` are given once for all prompts or once
        for each. A text alone is a list of one. `progress` shows a bar of the prompts that have ended, and tokens/s.

        Raises InvalidRequest before anything runs. A request that fails while it runs fails alone: its Generation has
        the `error`, and asking for its text raises it.
        """
        asks = make_asks([prompts] if isinstance(prompts, str) else prompts, adapter, scale, sampling)
        return self._generate(asks, progress)

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        *,
        adapter: str | Sequence[str] = BASE_ID,
        scale: float | Sequence[float | None] | None = None,
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = False,
    ) -> list[Generation]:
        """The next message of each conversation, a list of dicts of `role` and `content`, by the model's own chat
        template; all else is as with `generate`. One conversation alone is a list of one.
        """
        several = [conversations] if is_conversation(conversations) else cast(Sequence[Conversation], conversations)
        chats = [as_chat(conversation) for conversation in several]
        return self._generate(make_asks(chats, adapter, scale, sampling), progress)

    def stream(
        self,
        prompt: Prompt | Conversation,
        *,
        adapter: str = BASE_ID,
        scale: float | None = None,
        sampling: SamplingParams | None = None,
    ) -> Stream:
        """Begin to generate for one prompt or conversation: an iterator of Deltas. Raises InvalidRequest, QueueFull."""
        asks = make_asks([prompt], adapter, scale, sampling)
        with self._driver.holding({adapter} - {BASE_ID}) as versions:
            (run,) = self._maker.make(asks, versions, streamed=True)
            return Stream(self._driver, run)

    def status(self) -> EngineStatus:
        return self._driver.status()

    def check(self) -> None:
        """Raise AssertionError on a broken invariant of the engine."""
        self._driver.check()

    def close(self) -> None:
        """Give everything back. Streams that are open end with EngineUnavailable; a second close does nothing."""
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        model = self._config.model
        return f"LLM({Path(model.path).name!r}, {model.dtype} on {model.device}, {len(self._versions.names)} adapters)"

    def _read(
        self, source: str | Path | Mapping[str, Tensor], config: LiveConfig | Mapping[str, Any] | None
    ) -> AdapterFiles:
        max_rank = self._config.max_rank
        if isinstance(source, str | Path):
            if config is not None:
                raise InvalidRequest("config", "a folder has its own; it goes with a state dict")
            return open_folder(Path(source), self._base, max_rank, self._check)
        if config is None:
            raise InvalidRequest("config", "a state dict needs its configuration")
        return open_bytes(*adapter_files(source, config), self._base, max_rank, self._check)

    def _generate(self, asks: list[Ask], progress: bool) -> list[Generation]:
        with self._driver.holding({ask.adapter for ask in asks} - {BASE_ID}) as versions:
            runs = self._maker.make(asks, versions)
            try:
                self._complete(runs, progress)
            finally:
                self._driver.end(runs)
        return [run.result() for run in runs]

    def _complete(self, runs: list[Run], progress: bool) -> None:
        """Run to the end what nobody has started yet."""
        waiting, running = deque(runs), list[Run]()
        num_tokens, begun_s = 0, time.monotonic()
        with tqdm(total=len(runs), unit="prompt", disable=not progress) as bar:
            while waiting or running:
                running += self._driver.advance(waiting)
                ended = [run for run in running if run.ended]
                running = [run for run in running if run not in ended]
                if progress:
                    num_tokens += sum(run.num_tokens for run in ended)
                    total = num_tokens + sum(run.num_tokens for run in running)
                    bar.set_postfix_str(f"{total / (time.monotonic() - begun_s):.0f} tokens/s", refresh=False)
                    bar.update(len(ended))
