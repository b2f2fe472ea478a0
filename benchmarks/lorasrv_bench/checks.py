"""Whether a server's output is right. A speed is told of right output only.

What an API lets one hold a server to:

- every answer: its length, its prompt's length and the weights that it says it used are what was asked;
- a sample of answers, given alone, without neighbours, is scored by the server's own log-probabilities: every greedy
  token must be the likeliest there, within what rounding may change. In bf16 two right implementations choose other
  tokens at near-ties, and all tokens behind those differ; scored in place, each token still has to be nearly the best;
- the same answers scored under other weights must fail that, or the check could tell nothing;
- prompts through several adapters give different answers;
- a server that promises the same bits whatever the batch repeats the sample token by token.

Answers that are known (the demo's) are compared to the letter. A server of text only, that gives no scores, is held to
lengths, to differing adapters, and, if it is said to be exact, to repeating itself.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from lorasrv_bench.asks import Ask
from lorasrv_bench.load import Backend, Call, CallFailed, End, Piece

# How much less likely than the best a greedy token may be, in nats: what rounding moves logits by.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}
SAMPLE = 8
COMPARED = 4
COMPARED_TOKENS = 16


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`wrong` says what was found wrong, each in a sentence; `done` what was checked, with how many cases."""

    wrong: tuple[str, ...]
    done: tuple[str, ...]


class Scorer(Protocol):
    """A server that can say how likely tokens are."""

    async def gaps(self, ask: Ask, token_ids: Sequence[int]) -> list[float]:
        """For each token of an answer, how much less likely it is than the best one in its place, in nats.

        Computed with the answer as part of the prompt. Raises CallFailed.
        """
        ...


def check_calls(calls: Sequence[Call], asks: Mapping[int, Ask], versions: Mapping[str, str]) -> Verdict:
    """What every answer says of itself. `versions` are the digests that names mean, where that is known."""
    wrong: list[str] = []
    num_exact = num_known = num_versions = 0
    for call in calls:
        if call.error is not None:
            continue
        ask = asks[call.index]
        if ask.exact_tokens:
            num_exact += 1
            if call.output_tokens != ask.max_tokens:
                wrong.append(f"request {call.index}: {call.output_tokens} tokens came, {ask.max_tokens} were asked for")
            if call.asked_prompt_tokens is not None and call.prompt_tokens != call.asked_prompt_tokens:
                wrong.append(
                    f"request {call.index}: the server read {call.prompt_tokens} tokens of a prompt of "
                    f"{call.asked_prompt_tokens}"
                )
        if ask.answer is not None:
            num_known += 1
            if call.text != ask.answer:
                wrong.append(f"request {call.index}: {ask.name} answered {call.text!r}, not {ask.answer!r}")
        if call.version is not None and ask.name in versions:
            num_versions += 1
            if call.version != versions[ask.name]:
                wrong.append(f"request {call.index}: {ask.name} was served by version {call.version[:12] or 'base'}")
    if calls and all(call.error is not None for call in calls):
        wrong.append(f"no request succeeded; the first failed with {calls[0].error}")
    done = [
        f"{count} {what}"
        for count, what in ((num_exact, "lengths"), (num_versions, "versions"), (num_known, "answers to the letter"))
        if count
    ]
    return Verdict(wrong=tuple(wrong), done=tuple(done))


def sampled(calls: Sequence[Call], seed: int, size: int = SAMPLE) -> list[Call]:
    """Answered calls of as many different adapters as there are, drawn by seed."""
    shuffled = [call for call in calls if call.error is None and call.output_tokens]
    random.Random(seed).shuffle(shuffled)
    first = {call.adapter: call for call in reversed(shuffled)}
    others = [call for call in shuffled if call is not first[call.adapter]]
    return [*first.values(), *others][:size]


async def check_scores(
    scorer: Scorer,
    sample: Sequence[Call],
    asks: Mapping[int, Ask],
    other_than: Callable[[Ask], str | None],
    tolerance: float,
) -> Verdict:
    """Score answers under the weights that were asked for, and under others, which `other_than` names."""
    wrong: list[str] = []
    num_tokens = num_foreign = num_told = 0
    for call in sample:
        ask = asks[call.index]
        gaps = await scorer.gaps(ask, call.token_ids)
        num_tokens += len(gaps)
        worst = max(range(len(gaps)), key=gaps.__getitem__)
        if gaps[worst] > tolerance:
            wrong.append(
                f"request {call.index}: token {worst} of {ask.name} is {gaps[worst]:.3g} nats from the likeliest when "
                f"scored alone; {tolerance:g} is what rounding explains"
            )
        other = other_than(ask)
        if other is not None:
            num_foreign += 1
            foreign = await scorer.gaps(replace(ask, name=other), call.token_ids)
            num_told += max(foreign) > tolerance
    if num_foreign and not num_told:
        wrong.append(f"{num_foreign} answers pass as well under other weights: adapters make no difference")
    return Verdict(
        wrong=tuple(wrong),
        done=(f"{num_tokens} tokens scored alone", f"{num_told} of {num_foreign} answers told from other weights'"),
    )


async def check_differ(
    backend: Backend, names: Sequence[str], prompts: Sequence[tuple[int, ...]], tenant: int
) -> Verdict:
    """Any two of the names have to answer one of the prompts differently; on a single one, two may well agree."""
    ask = Ask(index=0, at_s=0, name="", adapter=None, tenant=tenant, prompt=(), max_tokens=COMPARED_TOKENS)
    answers: dict[tuple[tuple[tuple[int, ...], str], ...], str] = {}
    wrong: list[str] = []
    for name in names:
        given = [await answer_alone(backend, replace(ask, name=name, prompt=prompt)) for prompt in prompts]
        first = answers.setdefault(tuple(given), name)
        if first != name:
            wrong.append(f"{first} and {name} give the same {COMPARED_TOKENS} tokens to each of {len(prompts)} prompts")
    return Verdict(wrong=tuple(wrong), done=(f"{len(names)} models compared on {len(prompts)} prompts",))


async def check_repeats(backend: Backend, sample: Sequence[Call], asks: Mapping[int, Ask], *, exact: bool) -> Verdict:
    """Ask the sample again, alone; where the server is `exact` the answers have to be the same."""
    same = 0
    wrong: list[str] = []
    for call in sample:
        if await answer_alone(backend, asks[call.index]) == (call.token_ids, call.text):
            same += 1
        elif exact:
            wrong.append(f"request {call.index}: {asks[call.index].name} gives another answer when asked alone")
    return Verdict(wrong=tuple(wrong), done=(f"{same} of {len(sample)} answers repeated to the letter",))


async def answer_alone(backend: Backend, ask: Ask) -> tuple[tuple[int, ...], str]:
    """The tokens, where they are told, and the text of one request. Raises CallFailed."""
    pieces: list[Piece] = []
    ended = False
    async for event in backend.stream(ask):
        if isinstance(event, End):
            ended = True
        else:
            pieces.append(event)
    if not ended:
        raise CallFailed("the stream broke off")
    return tuple(token for piece in pieces for token in piece.token_ids), "".join(piece.text for piece in pieces)


def both(*verdicts: Verdict) -> Verdict:
    return Verdict(
        wrong=tuple(each for verdict in verdicts for each in verdict.wrong),
        done=tuple(each for verdict in verdicts for each in verdict.done),
    )
