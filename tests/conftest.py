"""Settings of the whole suite."""

import torch

# The suite's models are tiny: a second thread costs more than it gives, and far more on a busy machine.
torch.set_num_threads(1)
