"""Where Triton's kernels run in tests: on the GPU, or without one in Triton's interpreter. Imported before they are."""

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
