"""Adapters of random weights for a base model, as PEFT would save them: made on the fly, pushed, and removed behind."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from lorasrv.client import Client
from lorasrv.client.errors import NotFound
from lorasrv.model.base_shapes import base_shapes
from lorasrv_adapters.base import BaseShapes


def write_adapter(folder: Path, base: BaseShapes, *, rank: int, seeds: tuple[int, ...]) -> Path:
    """A PEFT folder of that rank on all linear modules.

    Elements of B·A deviate by 1/√in_features, as weights do at initialisation: so that greedy tokens are others than
    the base's.
    """
    # Loaded here: a client that makes no adapters needs none of it.
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([*seeds, rank])
    tensors: dict[str, np.ndarray] = {}
    for layer in range(base.num_layers):
        for module in base.modules:
            prefix = f"base_model.model.{base.layer_prefix}.{layer}.{module.path}"
            a = rng.standard_normal((rank, module.in_features), dtype=np.float32)
            b = rng.standard_normal((module.out_features, rank), dtype=np.float32)
            b *= np.float32((rank * module.in_features) ** -0.5)
            tensors[f"{prefix}.lora_A.weight"] = a.astype(np.float16)
            tensors[f"{prefix}.lora_B.weight"] = b.astype(np.float16)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted({module.path.rpartition(".")[2] for module in base.modules}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def write_adapters(
    folder: Path,
    model: Path,
    ranks: Mapping[int, int],
    *,
    seeds: tuple[int, ...],
    advance: Callable[[], None] = lambda: None,
) -> dict[int, Path]:
    """A folder for each adapter, by number, of the rank that `ranks` gives it. Raises UnsupportedModel, OSError."""
    base = base_shapes(model, "float32")
    folders: dict[int, Path] = {}
    for number, rank in ranks.items():
        folders[number] = write_adapter(folder / f"adapter-{number:05d}", base, rank=rank, seeds=(*seeds, number))
        advance()
    return folders


@contextmanager
def pushed(
    clients: Sequence[Client],
    folders: Mapping[str, Path],
    tenants: Mapping[str, int],
    advance: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, str]]:
    """Publish each folder under its name, for its tenant, and yield the digests by name; in the end purge all of them.

    Raises AlreadyExists for a name that is taken, which is left alone, and ClientError.
    """
    mine: list[str] = []
    digests: dict[str, str] = {}
    try:
        for name, folder in folders.items():
            client = clients[tenants[name] % len(clients)]
            digests[name] = client.push(folder, name, create_only=True).digest
            mine.append(name)
            advance()
        yield digests
    finally:
        for name in mine:
            try:
                clients[tenants[name] % len(clients)].delete_adapter(name, purge=True)
            except NotFound:
                continue
