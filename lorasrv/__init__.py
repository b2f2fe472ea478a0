"""Multi-LoRA serving: one base model, thousands of adapters."""

__version__ = "0.1.0"
