"""Where Triton's kernels are tested: on a GPU, or in Triton's interpreter, asked for before Triton loads."""

import os
import sys

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if DEVICE.type == "cpu":
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", "Triton is here already"
    os.environ["TRITON_INTERPRET"] = "1"
