"""The engine as the front process sees it: `Engine`, behind a process (`ProcessEngine`) or a thread (`ThreadEngine`)."""

from collections.abc import AsyncGenerator, Callable
from typing import Literal, Protocol

from lorasrv.types import EngineInfo, EngineRequest, EngineStatus, TokenDelta

EngineState = Literal["starting", "ready", "unavailable"]


class Engine(Protocol):
    """All methods belong to one event loop."""

    @property
    def state(self) -> EngineState:
        """"starting" until the first `start` returns; "unavailable" while the engine is down, and after `close`."""
        ...

    async def start(self) -> EngineInfo:
        """Start the engine and wait until it can serve. Raises what start-up failed with, e.g. UnsupportedModel."""
        ...

    def stream(self, request: EngineRequest) -> AsyncGenerator[TokenDelta, None]:
        """The request's deltas; the last one has `finish`. Closing the generator early cancels the request.

        A reader that lags gets fewer, longer deltas. Raises the request's failure, GenerationExists for a request id
        that is running, and EngineUnavailable when the engine is not ready or goes away.
        """
        ...

    async def status(self) -> EngineStatus:
        """Raises EngineUnavailable."""
        ...

    def on_state_change(self, callback: Callable[[EngineState], None]) -> None:
        """Call `callback` in the event loop with every new state from now on."""
        ...

    async def close(self) -> None:
        """End the engine and all that it holds. Running streams raise EngineUnavailable. Safe to call twice."""
        ...
