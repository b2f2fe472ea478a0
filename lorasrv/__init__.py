"""Multi-LoRA serving: one base model, thousands of adapters."""
