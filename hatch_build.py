"""Compiles the native CPU code when the package is built. Where that fails, say without a compiler, the package is
built without it: torch computes then, and `lorasrv doctor` says so."""

import importlib.util
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("kernels/lorasrv_kernels/native")


class NativeBuildHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        native = _load(Path(self.root) / NATIVE)
        for failure in native.compile_all():
            self.app.display_warning(f"lorasrv's CPU kernels are not all built: {failure}")
        if any(target.library.exists() for target in native.targets()):
            build_data["artifacts"].append(f"/{NATIVE}/*.so")
            build_data["pure_python"] = False
            # The libraries know nothing of Python, so any version will do.
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"


def _load(package: Path) -> ModuleType:
    """The package by its folder: nothing is installed yet."""
    spec = importlib.util.spec_from_file_location("lorasrv_native", package / "__init__.py")
    assert spec is not None and spec.loader is not None, package
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
