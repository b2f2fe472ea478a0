"""Small host values on their way to the device: one copy for all arrays of a step, which nobody waits for.

A pinned buffer may be written again when its copy has ended, so a few are used in turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_ALIGN_BYTES = 16
_NUM_SLOTS = 4

Array = np.ndarray[tuple[int, ...], np.dtype[np.generic]]


@dataclass
class _Slot:
    """A pinned buffer, and the end of the last copy out of it."""

    buffer: Tensor  # uint8
    copied: torch.Event | None = None


class Staging:
    """Owned by the engine's thread; copies are made in the order of the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots = [_Slot(torch.empty(0, dtype=torch.uint8)) for _ in range(_NUM_SLOTS)]
        self._next = 0

    def upload(self, arrays: Mapping[str, Array], into: Tensor | None = None) -> dict[str, Tensor]:
        """The arrays as tensors of the device, under their names.

        `into` is a device's uint8 buffer of at least `num_bytes(arrays)`: arrays of one list of shapes always have
        their places there, whatever their values.
        """
        if self._device.type == "cpu" and into is None:
            return {name: _tensor(array) for name, array in arrays.items()}
        places = _places(list(arrays.values()))
        target = torch.empty(places[-1], dtype=torch.uint8, device=self._device) if into is None else into
        host = self._host_buffer(places[-1])
        for place, array in zip(places, arrays.values(), strict=False):
            host[place : place + array.nbytes].view(_dtype(array)).view(array.shape).copy_(_tensor(array))
        target[: places[-1]].copy_(host, non_blocking=True)
        if self._device.type == "cuda":
            self._slots[self._next].copied = torch.cuda.current_stream(self._device).record_event()
            self._next = (self._next + 1) % _NUM_SLOTS
        return views(arrays, target)

    def _host_buffer(self, num_bytes: int) -> Tensor:  # uint8 [num_bytes]
        slot = self._slots[self._next]
        if slot.copied is not None:
            slot.copied.synchronize()
        if slot.buffer.numel() < num_bytes:
            pinned = self._device.type == "cuda"
            slot.buffer = torch.empty(2 * num_bytes, dtype=torch.uint8, pin_memory=pinned)
        return slot.buffer[:num_bytes]


def num_bytes(arrays: Mapping[str, Array]) -> int:
    """What `upload` takes up in its buffer."""
    return _places(list(arrays.values()))[-1]


def views(
    arrays: Mapping[str, Array],
    buffer: Tensor,  # uint8, as `upload` was given
) -> dict[str, Tensor]:
    """Where arrays of these shapes lie in a buffer."""
    places = _places(list(arrays.values()))
    return {
        name: buffer[place : place + array.nbytes].view(_dtype(array)).view(array.shape)
        for place, (name, array) in zip(places, arrays.items(), strict=False)
    }


def _places(arrays: Sequence[Array]) -> list[int]:
    """Where each array begins, and where the last one ends."""
    places = [0]
    for array in arrays:
        places.append(-(-(places[-1] + array.nbytes) // _ALIGN_BYTES) * _ALIGN_BYTES)
    return places


def _dtype(array: Array) -> torch.dtype:
    return _tensor(array[:0]).dtype


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(array)  # pyright: ignore[reportUnknownMemberType]
