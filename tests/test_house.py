"""Rules on the tree itself: where files may lie, which way imports point, what loads without what."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("lorasrv", "kernels/lorasrv_kernels", "adapters/lorasrv_adapters", "benchmarks/lorasrv_bench")
# A room of `lorasrv` imports rooms of the layers before its own; the first layer is one room.
LAYERS = (
    {"addresses", "types", "errors", "config", "requests", "keys"},
    {"memory"},
    {"sched", "model"},
    {"engine"},
    {"offline", "server", "client", "sim"},
    {"llm", "demo"},
    {"cli"},
)
# The command line and the demo print the messages that the client hands them.
WIRE_ROOMS = {"server", "client", "demo", "cli", "v1"}
# The two halves of `memory`: these hold tensors, all else is accounting.
STORAGE = {"lorasrv.memory." + name for name in ("arena", "casts", "packing", "staging", "storage", "tensors")}
# The two sides of the process boundary need msgspec and pyzmq, see `engine.channel`.
BOUNDARY = {"lorasrv.engine." + name for name in ("channel", "process", "child", "client")}


def sources() -> dict[str, ast.Module]:
    """Every module that we ship, by its import name, but the generated ones."""
    found: dict[str, ast.Module] = {}
    for package in PACKAGES:
        folder = ROOT / package
        for path in sorted(folder.rglob("*.py")):
            name = ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
            if not name.startswith("lorasrv.v1."):
                found[name] = ast.parse(path.read_text(), filename=str(path))
    return found


SOURCES = sources()


def imports(module: str) -> Iterator[str]:
    """What a module names in its imports, those inside functions and `from package import module` included."""
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{module} has a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module: str) -> str | None:
    package, _, rest = module.partition(".")
    return rest.split(".")[0] if package == "lorasrv" and rest else None


def layer_of(room: str) -> int:
    found = [layer for layer, rooms in enumerate(LAYERS) if room in rooms]
    assert found, f"lorasrv/{room} is new: give it its place in LAYERS"
    return found[0]


def modules_in(*prefixes: str) -> list[str]:
    return [name for name in SOURCES if any(name == p or name.startswith(p + ".") for p in prefixes)]


@pytest.mark.parametrize("folder", ["kernels", "adapters", "proto", "benchmarks"])
def test_folders_that_hold_packages_are_none(folder: str) -> None:
    """`kernels/__init__.py` would shadow a PyPI package that transformers imports."""
    assert (ROOT / folder).is_dir()
    assert not list((ROOT / folder).glob("*.py"))
    assert not (ROOT / "tests" / folder).exists()
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_imports_point_down() -> None:
    wrong: list[str] = []
    for module in SOURCES:
        room = room_of(module)
        if room is None or room == "v1":
            continue
        layer = layer_of(room)
        for target in imports(module):
            other = room_of(target)
            if other is None or other in (room, "v1", "__version__", "LLM"):
                continue
            if layer_of(other) >= layer > 0 or layer_of(other) > layer:
                wrong.append(f"{module} imports {target}")
    assert not wrong


def test_only_the_wires_ends_know_the_generated_code() -> None:
    assert {room_of(m) for m in SOURCES if any(room_of(t) == "v1" for t in imports(m))} <= WIRE_ROOMS


def test_the_client_stands_alone() -> None:
    rooms = {room_of(target) for module in modules_in("lorasrv.client") for target in imports(module)}
    assert rooms <= {None, "client", "v1", *LAYERS[0]}


def test_kernels_and_adapters_know_nobody() -> None:
    for package in ("lorasrv_kernels", "lorasrv_adapters"):
        assert modules_in(package)
        for module in modules_in(package):
            ours = {target.split(".")[0] for target in imports(module) if target.startswith("lorasrv")}
            assert ours <= {package}, module


def test_decisions_and_accounting_import_no_tensors() -> None:
    decisions = set(modules_in("lorasrv.sched", "lorasrv.memory")) - STORAGE
    assert {"lorasrv.sched.scheduler", "lorasrv.memory.pages"} <= decisions
    for module in decisions:
        assert not {"torch", "numpy", "triton", "grpc"} & {target.split(".")[0] for target in imports(module)}, module
        assert not STORAGE & set(imports(module)), module


def run_without(blocked: Iterable[str], modules: Iterable[str], folder: Path = ROOT) -> str:
    """Import `modules`, also from `folder`, in a new process in which the packages `blocked` do not exist; what they
    print, and the names it loaded.
    """
    program = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {set(blocked)!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)
sys.meta_path.insert(0, Blocked())
sys.path[:0] = {[str(ROOT / each) for each in (folder, ".", "kernels", "adapters", "benchmarks")]!r}
import importlib
for module in {list(modules)!r}:
    importlib.import_module(module)
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_bare_gpu_box_can_run_the_engine() -> None:
    engine = modules_in("lorasrv_kernels", "lorasrv.model", "lorasrv.memory", "lorasrv.sched", "lorasrv.engine")
    bare = sorted(set(engine) - BOUNDARY)
    assert set(engine) > BOUNDARY
    assert {"lorasrv.engine.core", "lorasrv.engine.loop", "lorasrv_kernels.reference"} <= set(bare)
    loaded = run_without(
        ("msgspec", "zmq", "grpc", "google", "typer", "rich", "platformdirs", "peft", "re2"), bare
    ).split()
    assert set(bare) <= set(loaded)


def test_the_client_needs_no_server_package() -> None:
    extra = PROJECT["optional-dependencies"]["server"]
    blocked = {package_of(requirement).replace("-", "_") for requirement in extra} | {"zmq", "re2"}
    assert {"torch", "numpy", "tokenizers", "msgspec"} <= blocked
    loaded = run_without(blocked, ["lorasrv", "lorasrv.client", "lorasrv.cli.main"]).split()
    assert "lorasrv.client" in loaded
    assert not {"torch", "numpy"} & set(loaded)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def package_of(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None, requirement
    return match[0]


def test_every_dependency_is_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert all(re.fullmatch(r"[\d.]+", version) for version in pins.values()), "local or unpinned versions"
    named = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    assert not {package_of(requirement) for requirement in named} - pins.keys()
