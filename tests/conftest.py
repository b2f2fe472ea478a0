"""Settings of the whole suite."""

import signal

import torch

# The suite's models are tiny: a second thread costs more than it gives, and far more on a busy machine.
torch.set_num_threads(1)

# A shell starts background jobs with SIGINT ignored, which children inherit: the commands under test are to get it.
signal.signal(signal.SIGINT, signal.default_int_handler)
