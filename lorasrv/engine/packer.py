"""From an adapter's validated files to its page image. Stateless, and without torch: builder processes run it too."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from lorasrv.memory.casts import FILE_TYPES, Array
from lorasrv.memory.layout import PageLayout
from lorasrv.memory.packing import AdapterPlan, LoraModule, ModuleShapes, PackedAdapter, fill_pages, plan_adapter
from lorasrv_adapters.errors import MalformedFile
from lorasrv_adapters.peft_format import AdapterSpec
from lorasrv_adapters.published import AdapterFiles
from lorasrv_adapters.safetensors_header import TensorEntry


def pageable(num_pages: int, page_bytes: int) -> Array:  # uint8 [num_pages, page_bytes]
    return np.empty((num_pages, page_bytes), np.uint8)


@dataclass(frozen=True, kw_only=True)
class Packer:
    """Packs for one pool; `module_shapes` is (path, in_features, out_features) in directory order. `allocate` gives
    the pages of images that lie in no arena."""

    layout: PageLayout
    module_shapes: ModuleShapes
    allocate: Callable[[int, int], Array] = pageable

    def plan(self, spec: AdapterSpec) -> AdapterPlan:
        """Raises AdapterLoadFailed when the adapter cannot be laid out."""
        modules = (LoraModule(layer=m.layer, module=m.module, rank=m.rank, scale=m.scale) for m in spec.modules)
        return plan_adapter(modules, self.layout, self.module_shapes)

    def fill(self, files: AdapterFiles, plan: AdapterPlan, pages: Array, places: Sequence[int]) -> PackedAdapter:
        """Read a version into rows `places` of `pages`. Raises OSError or MalformedFile when it cannot be read."""
        with files.open_weights() as file:
            return fill_pages(plan, _matrices(file, files.spec), pages, places)

    def pack(self, files: AdapterFiles) -> PackedAdapter:
        """Read a version into pages of its own; raises as `plan` and `fill` do."""
        plan = self.plan(files.spec)
        return self.fill(files, plan, self.allocate(plan.num_pages, self.layout.page_bytes), range(plan.num_pages))


def _matrices(file: BinaryIO, spec: AdapterSpec) -> Iterator[tuple[Array, Array]]:
    """One module at a time, in directory order, which is a spec's."""
    for module in spec.modules:
        yield _read(file, module.a), _read(file, module.b)


def _read(file: BinaryIO, entry: TensorEntry) -> Array:
    data = bytearray(entry.num_bytes)
    file.seek(entry.begin)
    if file.readinto(data) != entry.num_bytes:  # type: ignore[attr-defined]
        raise MalformedFile(f"tensor {entry.name}: the file ends inside it")
    return np.frombuffer(data, FILE_TYPES[entry.dtype]).reshape(entry.shape)
