"""What the runner is asked to draw and to score for a chunk, decided from the sequence's own tokens alone.

Nothing is kept from step to step: a request that was preempted and is computed again is asked for the same.
"""

from collections import Counter
from collections.abc import Sequence as Seq

from lorasrv.engine.batch import ScoreInput
from lorasrv.errors import InvalidRequest
from lorasrv.model.logit_edits import LogitEdits
from lorasrv.sched.sequence import Sequence
from lorasrv.types import EngineRequest, FinishReason, LogitRules


def check_named_tokens(request: EngineRequest, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
    """Raises InvalidRequest for token ids outside the vocabulary, and where no token could ever be drawn."""
    rules = request.rules or LogitRules()
    biased = [token_id for token_id, _ in rules.logit_bias]
    bad = [token_id for word in rules.bad_words for token_id in word]
    for field, token_ids in (("logit_bias", biased), ("bad_words", bad), ("stop_token_ids", request.stop_token_ids)):
        outside = next((token_id for token_id in token_ids if not 0 <= token_id < vocab_size), None)
        if outside is not None:
            raise InvalidRequest(field, f"token id {outside} is outside the vocabulary of {vocab_size}")
    masked = {word[-1] for word in rules.bad_words}
    if request.min_tokens:
        masked |= _end_token_ids(request, eos_token_ids)
    if len(masked) == vocab_size:
        raise InvalidRequest(
            "bad_words", f"with min_tokens {request.min_tokens}, they can mask all {vocab_size} tokens"
        )


def score_input(sequence: Sequence, start: int, end: int) -> ScoreInput | None:
    """The prompt tokens that the rows `[start, end)` tell the log-probabilities of and that are still owed."""
    request = sequence.request
    if request.prompt_logprobs is None:
        return None
    first, last = max(start + 1, sequence.num_scored), min(end + 1, len(request.token_ids))
    if first >= last:
        return None
    return ScoreInput(token_ids=request.token_ids[first:last], start=first, num_top=request.prompt_logprobs)


def first_needed_row(sequence: Sequence) -> int:
    """The first position whose logits are still needed: by then its KV may not just come from the prefix cache."""
    request = sequence.request
    if request.prompt_logprobs is not None and sequence.num_scored < len(request.token_ids):
        return sequence.num_scored - 1
    return len(sequence.token_ids) - 1


def logit_edits(request: EngineRequest, token_ids: Seq[int], eos_token_ids: frozenset[int]) -> LogitEdits | None:
    """What the request changes in the logits behind `token_ids`, its prompt and what it has generated.

    Repetition penalty and bad words look at the prompt too, as in transformers (the penalty: Keskar et al., "CTRL",
    2019); presence and frequency penalty at generated tokens only, as in OpenAI's API.
    """
    num_prompt, rules = len(request.token_ids), request.rules
    masked: set[int] = set()
    if len(token_ids) - num_prompt < request.min_tokens:
        masked |= _end_token_ids(request, eos_token_ids)
    if rules is None:
        return LogitEdits(masked=tuple(masked)) if masked else None
    added = dict(rules.logit_bias)
    if rules.presence_penalty or rules.frequency_penalty:
        for token_id, count in Counter(token_ids[num_prompt:]).items():
            taken = rules.presence_penalty + count * rules.frequency_penalty
            added[token_id] = added.get(token_id, 0.0) - taken
    return LogitEdits(
        repetition_penalty=rules.repetition_penalty,
        repeated=tuple(set(token_ids)) if rules.repetition_penalty != 1 else (),
        added=tuple(added.items()),
        masked=tuple(masked | _completing(rules.bad_words, token_ids)),
    )


def finish_reason(sequence: Sequence, eos_token_ids: frozenset[int]) -> FinishReason | None:
    """Whether the last token, a generated one, ends the request."""
    request, token_id = sequence.request, sequence.token_ids[-1]
    if token_id in eos_token_ids and not request.ignore_eos:
        return FinishReason.EOS
    if token_id in request.stop_token_ids:
        return FinishReason.STOP
    return FinishReason.LENGTH if sequence.num_generated == request.max_tokens else None


def _end_token_ids(request: EngineRequest, eos_token_ids: frozenset[int]) -> set[int]:
    """The tokens that end the request."""
    return {*request.stop_token_ids, *(() if request.ignore_eos else eos_token_ids)}


def _completing(bad_words: tuple[tuple[int, ...], ...], token_ids: Seq[int]) -> set[int]:
    """The last token of every bad word that all its other tokens have just come of."""
    return {word[-1] for word in bad_words if tuple(token_ids[len(token_ids) - len(word) + 1 :]) == word[:-1]}
