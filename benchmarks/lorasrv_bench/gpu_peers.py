"""Other projects' LoRA kernels, driven from a checkout that lies outside this one: see docs/gpu-benchmarks.md.

Nothing of theirs is here: a peer is our code that imports theirs from a path given to it and calls it as their own
layers do. Their packages' `__init__` files, which import whole servers, are not run.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PeerLoad:
    """One LoRA product, in tensors as peers want them. `out` is added to in place; the scale is 1."""

    x: Tensor  # [num_tokens, in_features], the rows of an adapter side by side, in the adapters' order
    out: Tensor  # [num_tokens, sum of out_features]
    a: tuple[Tensor, ...]  # of each module [num_adapters, rank, in_features]
    b: tuple[Tensor, ...]  # of each module [num_adapters, out_features, rank]
    rows: tuple[int, ...]  # of each adapter

    @property
    def rank(self) -> int:
        return self.a[0].shape[1]

    @property
    def out_features(self) -> tuple[int, ...]:
        return tuple(b.shape[1] for b in self.b)


class Peer(Protocol):
    @property
    def name(self) -> str: ...

    def prepare(self, loads: Sequence[PeerLoad]) -> list[Callable[[], None]]:
        """What computes each of them, everything that is done once a step or at start-up being done. All loads have
        the same shapes and rows."""
        ...


class Checkout:
    """A package that is imported from a folder without its `__init__` files: empty packages stand in for them, and
    `stubs` for modules of which only small things are needed."""

    def __init__(self, package: str, folder: Path, stubs: Mapping[str, Mapping[str, object]]) -> None:
        if not folder.is_dir():
            raise ImportError(f"there is no folder {folder}")
        present = [name for name in sys.modules if name.split(".")[0] == package]
        if any(not hasattr(sys.modules[name], "_lorasrv_checkout") for name in present if name == package):
            raise ImportError(f"the package {package} is loaded already, from elsewhere")
        self._package, self._folder = package, folder
        self._make(package)
        for name, values in stubs.items():
            self._stub(name, values)

    def has(self, name: str) -> bool:
        """Whether the checkout has a module of this name."""
        return self._path(name).with_suffix(".py").is_file()

    def load(self, name: str) -> ModuleType:
        """A module of the checkout. Raises ImportError, naming what is missing."""
        self._make_parents(name)
        return importlib.import_module(name)

    def first(self, names: Sequence[str]) -> ModuleType:
        """The first of these modules that the checkout has."""
        for name in names:
            if self.has(name):
                return self.load(name)
        raise ImportError(f"the checkout has none of {', '.join(names)}")

    def _path(self, name: str) -> Path:
        return self._folder.joinpath(*name.split(".")[1:])

    def _make_parents(self, name: str) -> None:
        parts = name.split(".")
        for end in range(1, len(parts)):
            self._make(".".join(parts[:end]))

    def _make(self, name: str) -> None:
        if name in sys.modules:
            return
        package = ModuleType(name)
        package.__path__ = [str(self._path(name))]
        package._lorasrv_checkout = True  # pyright: ignore[reportAttributeAccessIssue]
        sys.modules[name] = package
        self._bind(name, package)

    def _stub(self, name: str, values: Mapping[str, object]) -> None:
        self._make_parents(name)
        module = ModuleType(name)
        if self._path(name).is_dir():
            module.__path__ = [str(self._path(name))]
        module.__dict__.update(values)
        sys.modules[name] = module
        self._bind(name, module)

    def _bind(self, name: str, module: ModuleType) -> None:
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)


def find_peers(folder: Path | None, device: torch.device) -> tuple[list[Peer], dict[str, str]]:
    """The peers that can be driven from `folder`, and why the others cannot."""
    from lorasrv_bench import peers_sglang, peers_vllm

    makers: dict[str, Callable[[Path], Peer]] = {
        "vllm": peers_vllm.VllmPeer,
        "sglang-v1": peers_sglang.SegmentedPeer,
        "sglang-csgmv-16": lambda path: peers_sglang.ChunkedPeer(path, 16),
        "sglang-csgmv-128": lambda path: peers_sglang.ChunkedPeer(path, 128),
        "sglang-v2": peers_sglang.PlannedPeer,
    }
    if folder is None:
        return [], dict.fromkeys(makers, "no folder of peers was given (--peers)")
    if device.type != "cuda":
        return [], dict.fromkeys(makers, "peers' kernels are for GPUs")
    found: list[Peer] = []
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            found.append(make(folder))
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing
