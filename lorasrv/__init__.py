"""lorasrv: one base model, many LoRA adapters, one server."""
