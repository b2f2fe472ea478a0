"""The exact probabilities of a request's next token, worked out one logit at a time, in float64.

Written from what the wire and the sampler say of the knobs, and of the numbers; it shares no code with the product.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lorasrv.types import EngineRequest, LogitRules

_RULES = frozenset(LogitRules.__dataclass_fields__)


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A request that has generated some tokens and draws the next one."""

    request: EngineRequest
    generated: tuple[int, ...]
    eos: frozenset[int]

    @property
    def rules(self) -> LogitRules:
        return self.request.rules or LogitRules()

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.request.token_ids + self.generated

    @property
    def end_token_ids(self) -> frozenset[int]:
        return frozenset(self.request.stop_token_ids) | (frozenset() if self.request.ignore_eos else self.eos)


def moment(*, prompt: Sequence[int], generated: Sequence[int] = (), eos: Iterable[int] = (), **settings: Any) -> Moment:
    """`settings` are those of EngineRequest and LogitRules together."""
    rules = {name: settings.pop(name) for name in _RULES & settings.keys()}
    request = EngineRequest(
        request_id="r", token_ids=tuple(prompt), adapter=None, max_tokens=99, seed=0, rules=LogitRules(**rules)
    )
    return Moment(request=replace(request, **settings), generated=tuple(generated), eos=frozenset(eos))


# A stage takes logits and gives changed ones.
Stage = Callable[[list[float], Moment], list[float]]


def repetition(logits: list[float], now: Moment) -> list[float]:
    penalty, seen = now.rules.repetition_penalty, set(now.tokens)
    changed = [logit / penalty if logit > 0 else logit * penalty for logit in logits]
    return [changed[token] if token in seen else logit for token, logit in enumerate(logits)]


def sums(logits: list[float], now: Moment) -> list[float]:
    rules, counts, bias = now.rules, Counter(now.generated), dict(now.rules.logit_bias)
    return [
        logit
        + bias.get(token, 0.0)
        - rules.frequency_penalty * counts[token]
        - (rules.presence_penalty if counts[token] else 0.0)
        for token, logit in enumerate(logits)
    ]


def masks(logits: list[float], now: Moment) -> list[float]:
    tokens = list(now.tokens)
    masked = {word[-1] for word in now.rules.bad_words if [*tokens, word[-1]][-len(word) :] == list(word)}
    if len(now.generated) < now.request.min_tokens:
        masked |= now.end_token_ids
    return [-math.inf if token in masked else logit for token, logit in enumerate(logits)]


def temperature(logits: list[float], now: Moment) -> list[float]:
    if now.request.temperature == 0:
        return _keep(logits, [logits.index(max(logits))])
    return [logit / now.request.temperature for logit in logits]


def top_k(logits: list[float], now: Moment) -> list[float]:
    return _keep(logits, _likeliest_first(logits)[: now.request.top_k])


def top_p(logits: list[float], now: Moment) -> list[float]:
    probs, kept = softmax(logits), list[int]()
    for token in _likeliest_first(logits):
        if kept and math.fsum(probs[other] for other in kept) >= now.request.top_p:
            break
        kept.append(token)
    return _keep(logits, kept)


def min_p(logits: list[float], now: Moment) -> list[float]:
    probs = softmax(logits)
    return _keep(logits, [token for token, prob in enumerate(probs) if prob >= now.request.min_p * max(probs)])


STAGES: tuple[Stage, ...] = (repetition, sums, masks, temperature, top_k, top_p, min_p)


def exact_probs(logits: Sequence[float], now: Moment, stages: Sequence[Stage] = STAGES) -> list[float]:
    changed = list(logits)
    for stage in stages:
        changed = stage(changed, now)
    return softmax(changed)


def softmax(logits: Sequence[float]) -> list[float]:
    largest = max(logits)
    weights = [math.exp(logit - largest) for logit in logits]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _likeliest_first(logits: Sequence[float]) -> list[int]:
    return sorted(range(len(logits)), key=lambda token: (-logits[token], token))


def _keep(logits: Sequence[float], kept: Sequence[int]) -> list[float]:
    return [logit if token in kept else -math.inf for token, logit in enumerate(logits)]


def transformers_probs(logits: Sequence[float], now: Moment) -> list[float]:
    """By transformers' own processors, in float64; it has no presence and frequency penalty and splits no ties."""
    rules, asked = now.rules, now.request
    processors: list[Any] = [RepetitionPenaltyLogitsProcessor(rules.repetition_penalty)]
    if rules.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[token], amount] for token, amount in rules.logit_bias]))
    if rules.bad_words:
        processors.append(NoBadWordsLogitsProcessor([list(word) for word in rules.bad_words]))
    if asked.min_tokens and now.end_token_ids:
        ends = sorted(now.end_token_ids)
        processors.append(MinNewTokensLengthLogitsProcessor(len(asked.token_ids), asked.min_tokens, ends, device="cpu"))
    processors.append(TemperatureLogitsWarper(asked.temperature))
    if asked.top_k is not None:
        processors.append(TopKLogitsWarper(asked.top_k))
    processors += [TopPLogitsWarper(asked.top_p), MinPLogitsWarper(asked.min_p)]
    changed = LogitsProcessorList(processors)(
        torch.tensor([now.tokens]), torch.tensor([list(logits)], dtype=torch.float64)
    )
    return changed[0].softmax(-1).tolist()


def gumbel_token(logits: Sequence[float], temperature: float, seed: int, position: int) -> int:
    """The token that Gumbel-max draws."""
    noise = [-math.log(-math.log((_philox_word(seed, position, i) + 0.5) / 2**32)) for i in range(len(logits))]
    return max(range(len(logits)), key=lambda i: logits[i] / temperature + noise[i])


def _philox_word(seed: int, position: int, token_id: int) -> int:
    """Philox4x32-10 on plain integers: word token_id % 4 at the counter (token_id // 4, position, 0, 0)."""
    low = 0xFFFFFFFF
    c, k = (token_id // 4, position, 0, 0), (seed & low, (seed >> 32) & low)
    for _ in range(10):
        p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = ((q >> 32) ^ c[1] ^ k[0], q & low, (p >> 32) ^ c[3] ^ k[1], p & low)
        k = ((k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low)
    return c[token_id % 4]
