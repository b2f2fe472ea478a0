"""From an adapter's validated files to its page image. Stateless; runs in the host cache's worker threads."""

from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from lorasrv.memory.layout import PageLayout
from lorasrv.memory.packing import PackedAdapter, PackedModule, pack_adapter
from lorasrv_adapters.published import AdapterFiles
from lorasrv_adapters.safetensors_header import TensorEntry, iter_tensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Packer:
    """Packs for one pool; `module_shapes` is (path, in_features, out_features) in directory order. Images that are
    `pinned` are copied to a GPU beside its steps."""

    layout: PageLayout
    module_shapes: tuple[tuple[str, int, int], ...]
    dtype: torch.dtype
    pinned: bool = False

    def pack(self, files: AdapterFiles) -> PackedAdapter:
        """Read and pack a version. Raises AdapterLoadFailed when it cannot be laid out, OSError or MalformedFile when
        it cannot be read."""
        with files.open_weights() as file:
            modules = [
                PackedModule(
                    layer=spec.layer,
                    module=spec.module,
                    rank=spec.rank,
                    scale=spec.scale,
                    a=_read(file, spec.a),
                    b=_read(file, spec.b),
                )
                for spec in files.spec.modules
            ]
        return pack_adapter(modules, self.layout, self.module_shapes, self.dtype, pinned=self.pinned)


def _read(file: BinaryIO, entry: TensorEntry) -> Tensor:
    data = bytearray().join(iter_tensor(file, entry))
    return torch.frombuffer(data, dtype=_DTYPES[entry.dtype]).view(entry.shape)
