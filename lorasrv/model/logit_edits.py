"""What a request changes in one row of logits before a token is drawn. Standard library only."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LogitEdits:
    """Done in the order of the fields; within a field the token ids are all different.

    `repeated` are the tokens whose logits `repetition_penalty` divides when positive and multiplies when negative;
    `added` are amounts to add, by token; `masked` tokens cannot be drawn.
    """

    repetition_penalty: float = 1.0
    repeated: tuple[int, ...] = ()
    added: tuple[tuple[int, float], ...] = ()
    masked: tuple[int, ...] = ()
