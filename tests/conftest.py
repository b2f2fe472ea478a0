"""Settings of the whole suite."""

import os
import signal
from importlib.util import find_spec

import pytest

# The suite's models are tiny: a second thread costs more than it gives, and far more on a busy machine. Servers that
# tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from hypothesis import settings

import kernel_device  # asks for Triton's interpreter before anything imports Triton

torch.set_num_threads(1)

# The same examples in every run, and none of them timed; `make test-all` looks for new ones.
settings.register_profile("new_examples", settings.get_profile("ci"), derandomize=False)
settings.load_profile("ci")

# A shell starts background jobs with SIGINT ignored, which children inherit: the commands under test are to get it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A bare GPU box holds torch and transformers only: what it can run there is in test_gpu_*.py.
if any(find_spec(package) is None for package in ("msgspec", "zmq", "grpc_status", "pytest_asyncio", "peft")):
    collect_ignore_glob = ["test_[!g]*.py", "test_g[!p]*.py"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    """A test draws the same numbers whatever ran before it in its process."""
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "row(*numbers): rows of the table in test_bad_inputs.py that a test is about")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Kernels' tests run in Triton's interpreter where there is no GPU, and are GPU tests where there is one."""
    if kernel_device.DEVICE.type == "cuda":
        for item in items:
            if item.path.name.startswith("test_gpu_"):
                item.add_marker(pytest.mark.gpu)
