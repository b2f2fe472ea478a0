"""A device of time alone: a runner and a page storage that only say when things will have happened."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lorasrv.engine.batch import ChunkInput, Draw, PageCopy, StepOutput
from lorasrv.sim.clock import VirtualClock
from lorasrv.sim.cost import CostModel
from lorasrv.sim.images import SimImage
from lorasrv.sim.work import step_work


@dataclass(kw_only=True)
class SimDevice:
    """When its two streams are free, the steps' and the copies', and what they did; `params` are the weights of the
    adapters in its pages, by directory."""

    clock: VirtualClock
    costs: CostModel
    steps_free_s: float = 0.0
    copies_free_s: float = 0.0
    copied_bytes: int = 0
    busy_s: float = 0.0
    params: dict[int, int] = field(default_factory=dict[int, int])


@dataclass(kw_only=True, slots=True)
class SimCopy:
    """In place of `memory.storage.AdapterCopy`: `end_s` is when what is issued has arrived."""

    image: SimImage
    directory: int
    clock: VirtualClock
    end_s: float
    num_issued: int = 0

    @property
    def issued(self) -> bool:
        return self.num_issued == self.image.num_pages

    @property
    def ended(self) -> bool:
        return self.issued and self.end_s <= self.clock.now_s


class SimStorage:
    """In place of `memory.storage.PageStorage`."""

    def __init__(self, device: SimDevice) -> None:
        self._device = device

    @property
    def beside_steps(self) -> bool:
        return self._device.costs.hardware.runs_ahead

    def begin_adapter(self, adapter: SimImage, pages: Sequence[int], *, wait_for_steps: bool) -> SimCopy:
        device = self._device
        device.params[pages[0]] = adapter.params
        begin_s = device.steps_free_s if wait_for_steps else 0.0
        return SimCopy(image=adapter, directory=pages[0], clock=device.clock, end_s=begin_s)

    def advance(self, copy: SimCopy, max_bytes: int) -> int:
        """Beside the steps where they run beside the host, else at once and for all to wait."""
        device, page_bytes = self._device, copy.image.page_bytes
        num_pages = min(copy.image.num_pages - copy.num_issued, -(-max_bytes // page_bytes))
        num_bytes = num_pages * page_bytes
        copy_s = device.costs.copy_s(num_bytes)
        if device.costs.hardware.runs_ahead:
            device.copies_free_s = max(device.clock.now_s, device.copies_free_s, copy.end_s) + copy_s
            copy.end_s = device.copies_free_s
        else:
            device.clock.now_s += copy_s
            copy.end_s = device.clock.now_s
        copy.num_issued += num_pages
        device.copied_bytes += num_bytes
        return num_bytes


class SimRunner:
    """In place of `engine.runner`: every draw gives token 0."""

    def __init__(self, device: SimDevice) -> None:
        self._device = device

    @property
    def runs_ahead(self) -> bool:
        return self._device.costs.hardware.runs_ahead

    def forward(self, chunks: tuple[ChunkInput, ...], copies: tuple[PageCopy, ...] = ()) -> "SimStep":
        device = self._device
        device.clock.now_s += device.costs.host_s(len(chunks))
        forward_s = device.costs.forward_s(step_work(chunks, device.params))
        device.steps_free_s = max(device.clock.now_s, device.steps_free_s) + forward_s
        device.busy_s += forward_s
        return SimStep(device.clock, device.steps_free_s)


class SimStep:
    """A submitted step. The host is back from the step before it by the time its forward begins, so its draws never
    come late."""

    def __init__(self, clock: VirtualClock, end_s: float) -> None:
        self._clock = clock
        self._end_s = end_s
        self._num_draws = 0

    def draw(self, draws: tuple[Draw, ...]) -> None:
        self._num_draws = len(draws)

    def output(self) -> StepOutput:
        self._clock.sleep_until(self._end_s)
        return StepOutput(tokens=(0,) * self._num_draws)
