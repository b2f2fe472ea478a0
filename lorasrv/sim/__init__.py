"""The engine's own scheduling and accounting under a cost model and a virtual clock: no tensors, no device."""
