"""What `lorasrv doctor` looks at: each check says what it found and, where something is wrong, what to do about it."""

import os
import platform
import shutil
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from lorasrv import __version__
from lorasrv.client import Client, ClientError
from lorasrv.errors import LorasrvError
from lorasrv.v1 import server_pb2
from lorasrv_adapters.data_dir import CATALOGUE_FILE, is_owned
from lorasrv_adapters.database import SCHEMA_VERSION, schema_version
from lorasrv_adapters.errors import AdapterError

PACKAGES = ("torch", "triton", "transformers", "peft", "grpcio", "protobuf")
INSTALL = "pip install 'lorasrv[server]'"
LOW_DISK_BYTES = 1 << 30
ANSWER_TIMEOUT_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`note`: something is wrong, and serving goes on. `problem`: it would keep a server from starting."""

    subject: str
    detail: str
    state: Literal["ok", "note", "problem"] = "ok"
    advice: str | None = None


def versions() -> Iterator[Finding]:
    yield Finding(subject="lorasrv", detail=__version__)
    yield Finding(subject="python", detail=platform.python_version())
    for package in PACKAGES:
        try:
            yield Finding(subject=package, detail=version(package))
        except PackageNotFoundError:
            yield Finding(subject=package, detail="not installed")


def serving() -> Finding:
    """Whether the server's packages are there: loads them, as `lorasrv serve` does."""
    try:
        import_module("torch")
        import_module("lorasrv.server.serve")
    except ModuleNotFoundError as error:
        detail = f"not installed: there is no {error.name}"
        return Finding(subject="serve", detail=detail, state="problem", advice=INSTALL)
    return Finding(subject="serve", detail="installed")


def devices(torch: Any, driver: Path = Path("/dev/nvidiactl")) -> Iterator[Finding]:
    """The CPU, and every GPU that torch can use."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    kind = torch.backends.cpu.get_cpu_capability()
    yield Finding(
        subject="cpu",
        detail=f"{os.cpu_count()} cores ({kind}), {_size(memory)}; bf16 {_cpu_bf16(Path('/proc/cpuinfo'))}",
    )
    if not torch.cuda.is_available():
        if driver.exists():
            yield Finding(
                subject="cuda",
                detail=f"there is a GPU that torch {torch.__version__} cannot use",
                state="note",
                advice="install a torch build whose CUDA version the driver (nvidia-smi) supports",
            )
        else:
            yield Finding(subject="cuda", detail="no GPU")
        return
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            free, total = torch.cuda.mem_get_info()
            bf16 = "yes" if torch.cuda.is_bf16_supported() else "no"
        name = torch.cuda.get_device_name(index)
        yield Finding(subject=f"cuda:{index}", detail=f"{name}, {_size(free)} of {_size(total)} free; bf16 {bf16}")


def cpu_kernels() -> Finding:
    """What computes on the CPU, and why not in native code where it does not."""
    from lorasrv_kernels import cpu

    kernels = cpu.load()
    if isinstance(kernels, str):
        detail = f"torch alone, many times slower; native ones: {kernels}"
        advice = "with a C++ compiler here: python -m lorasrv_kernels.native"
        return Finding(subject="cpu kernels", detail=detail, state="note", advice=advice)
    products = "bf16 products too" if kernels.multiplies else "products by torch"
    return Finding(subject="cpu kernels", detail=f"native, for {kernels.name}, {products}")


def data_dir(folder: Path) -> Iterator[Finding]:
    """Whether a registry can be kept there."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.R_OK | os.W_OK | os.X_OK):
        what = "is not writable" if there.is_dir() else "is no folder"
        advice = "choose another with --data-dir, or make it this user's"
        yield Finding(subject="data dir", detail=f"{there} {what}", state="problem", advice=advice)
        return
    yield Finding(subject="data dir", detail=str(folder) if there == folder else f"{folder}, made by serve")
    free = shutil.disk_usage(there).free
    if free < LOW_DISK_BYTES:
        advice = "make room: pushes fail on a full disk"
        yield Finding(subject="disk", detail=f"{_size(free)} free", state="note", advice=advice)
    else:
        yield Finding(subject="disk", detail=f"{_size(free)} free")
    if there == folder:
        yield from _registry(folder)


def port(number: int) -> Finding:
    """Whether a server can listen there; if one does, what it says."""
    advice = f"choose another port: lorasrv serve --listen 127.0.0.1:{number + 1 if number < 65535 else 0}"
    with socket.socket() as probe:
        # As gRPC does: what a former server has left in TIME_WAIT is no hindrance.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", number))
        except PermissionError:
            return Finding(subject="port", detail=f"{number} is for root only", state="problem", advice=advice)
        except OSError:
            detail = f"{number} is taken by {_listener(number)}"
            return Finding(subject="port", detail=detail, state="problem", advice=f"{advice}; or stop what has it")
    return Finding(subject="port", detail=f"{number} is free")


def model(folder: Path) -> Iterator[Finding]:
    """Whether it could be served; without the server's packages, whether its config.json says so."""
    from lorasrv.model.families import read_architecture

    try:
        found = read_architecture(folder)
        detail = f"{found.name}: {found.architecture}, {found.num_layers} layers, context {found.context_tokens}"
        yield Finding(subject="model", detail=detail)
        yield from _model_files(folder)
    except ModuleNotFoundError:
        yield Finding(subject="model files", detail="not looked at: serve is not installed")
    except (LorasrvError, OSError) as error:
        advice = "name the folder of a whole Hugging Face checkpoint of a supported family, see README"
        yield Finding(subject="model", detail=str(error), state="problem", advice=advice)


def _model_files(folder: Path) -> Iterator[Finding]:
    from lorasrv.engine.chat import load_chat_template
    from lorasrv.engine.text import load_tokenizer
    from lorasrv.model.loader import checkpoint_files

    size = sum((folder / name).stat().st_size for name in checkpoint_files(folder))
    load_tokenizer(folder)
    chats = "no chat template" if load_chat_template(folder) is None else "a chat template"
    yield Finding(subject="model files", detail=f"{_size(size)} of weights, a tokenizer, {chats}")


def _registry(folder: Path) -> Iterator[Finding]:
    """What is in a data directory that is there already."""
    try:
        if is_owned(folder):
            advice = "stop the server that has it, or choose another with --data-dir"
            yield Finding(subject="registry", detail="held by a running server", state="problem", advice=advice)
        path = folder / CATALOGUE_FILE
        if not path.exists():
            yield Finding(subject="catalogue", detail="none yet")
            return
        found = schema_version(path)
    except (AdapterError, OSError) as error:
        advice = "restore the folder from a backup, or choose another with --data-dir"
        yield Finding(subject="catalogue", detail=str(error), state="problem", advice=advice)
        return
    if found > SCHEMA_VERSION:
        detail = f"schema {found}; this build reads up to {SCHEMA_VERSION}"
        advice = "install the lorasrv that wrote it, or a newer one"
        yield Finding(subject="catalogue", detail=detail, state="problem", advice=advice)
    else:
        brought = "" if found == SCHEMA_VERSION else f", brought to {SCHEMA_VERSION} when serve starts"
        yield Finding(subject="catalogue", detail=f"schema {found}{brought}")


def _listener(number: int) -> str:
    """Who answers at a port of this machine."""
    try:
        # Without a key: who listens there is not known yet.
        with Client(f"127.0.0.1:{number}", api_key="", timeout_s=ANSWER_TIMEOUT_S) as client:
            info, status = client.info(), client.status()
    except ClientError as error:
        # Only lorasrv servers give reasons.
        return "another program" if error.reason is None else f"a lorasrv server, which says {error.reason}"
    state = server_pb2.EngineState.Name(status.state).removeprefix("ENGINE_STATE_").lower()
    return (
        f"a lorasrv server {info.version} of {info.base_model.name}, {state}: "
        f"{status.running_requests} running, {status.waiting_requests} waiting"
    )


def _cpu_bf16(cpuinfo: Path) -> str:
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set[str]()
    return "in hardware" if flags & {"avx512_bf16", "amx_bf16", "bf16"} else "emulated"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"
