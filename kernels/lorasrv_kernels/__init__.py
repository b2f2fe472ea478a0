"""Multi-LoRA kernels over a paged pool, each beside its torch oracle. Needs torch, and Triton on a GPU."""
