"""Tokenize and Detokenize: text to token ids and back, for callers that count, cut or compare."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

from tokenizers import Tokenizer

from lorasrv.engine.admission import check_token_ids
from lorasrv.engine.chat import ChatTemplate, check_chat
from lorasrv.engine.prompts import encode_prompt
from lorasrv.errors import InvalidRequest, QueueFull
from lorasrv.requests import AdapterRef, Chat, Tokenized
from lorasrv.server.frontdesk import FrontDesk

MAX_TEXT_CHARS = 1 << 20
MAX_TOKEN_IDS = 1 << 20
# Fewer than there are text workers: admissions always have some.
MAX_RUNNING = 2
MAX_WAITING = 64

T = TypeVar("T")


class TokenDesk:
    """Belongs to the event loop; the work is done in `workers`, MAX_RUNNING calls at a time."""

    def __init__(
        self,
        *,
        desk: FrontDesk,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        vocab_size: int,
        workers: Executor,
    ) -> None:
        self._desk = desk
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._vocab_size = vocab_size
        self._workers = workers
        self._places = asyncio.Semaphore(MAX_RUNNING)
        self._num_waiting = 0

    async def tokenize(self, prompt: str | Chat | None, tenant: str, adapter: str) -> Tokenized:
        """What a generation with this prompt and adapter would begin with.

        Raises InvalidRequest, QueueFull, the registry's errors for the adapter, and what the chat template raises.
        """
        match prompt:
            case None:
                raise InvalidRequest("prompt", "set text or messages")
            case Chat():
                check_chat(prompt)
            case _:
                if len(prompt) > MAX_TEXT_CHARS:
                    raise InvalidRequest("text", f"{len(prompt)} characters; at most {MAX_TEXT_CHARS} are accepted")
        system_prompt = await self._desk.system_prompt(tenant, AdapterRef(name=adapter))

        def tokenize() -> Tokenized:
            text, encoding = encode_prompt(prompt, self._tokenizer, self._chat_template, system_prompt)
            return Tokenized(text=text, token_ids=tuple(encoding.ids), offsets=tuple(encoding.offsets))

        return await self._in_worker(tokenize)

    async def detokenize(self, token_ids: Sequence[int], *, with_special_tokens: bool) -> str:
        """Raises InvalidRequest and QueueFull."""
        if len(token_ids) > MAX_TOKEN_IDS:
            raise InvalidRequest("token_ids", f"{len(token_ids)} token ids; at most {MAX_TOKEN_IDS} are accepted")

        def detokenize() -> str:
            check_token_ids("token_ids", token_ids, self._vocab_size)
            return self._tokenizer.decode(list(token_ids), skip_special_tokens=not with_special_tokens)

        return await self._in_worker(detokenize)

    async def _in_worker(self, work: Callable[[], T]) -> T:
        if self._num_waiting >= MAX_WAITING:
            raise QueueFull(f"{self._num_waiting} calls wait to be tokenized; the limit is {MAX_WAITING}")
        self._num_waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._num_waiting -= 1
        # A call that is cancelled keeps its place for as long as it keeps its thread.
        loop, running = asyncio.get_running_loop(), self._workers.submit(work)
        running.add_done_callback(lambda _: loop.call_soon_threadsafe(self._places.release))
        return await asyncio.wrap_future(running)
