"""Multi-LoRA serving: one base model, thousands of adapters."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorasrv.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "__version__"]


def __getattr__(name: str) -> object:
    # A client machine has no torch: only what asks for LLM loads it.
    if name == "LLM":
        from lorasrv.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
