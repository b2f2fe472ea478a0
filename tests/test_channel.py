"""Messages come out of their bytes as they went in; anything else is refused."""

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasrv.config import EngineConfig, ModelConfig, PoolConfig
from lorasrv.engine.channel import MalformedMessage, decode, encode
from lorasrv.engine.messages import (
    Cancel,
    Configure,
    GetStatus,
    Heartbeat,
    Message,
    Ready,
    Shutdown,
    StartFailed,
    StatusReply,
    Step,
    Submit,
    failure_of,
)
from lorasrv.errors import ConfigurationError, UnsupportedModel
from lorasrv.types import (
    AdapterResidency,
    AdapterUse,
    EngineCounters,
    EngineInfo,
    EngineRequest,
    EngineStatus,
    Failure,
    FinishReason,
    LogitRules,
    PoolStats,
    PositionLogprobs,
    Tier,
    TokenDelta,
)

TEXT = st.text(max_size=20)
COUNT = st.integers(0, 2**63)
FLOAT = st.floats(allow_nan=False)
FAILURE = st.builds(Failure, reason=TEXT, message=TEXT)
USE = st.builds(AdapterUse, digest=TEXT, scale=FLOAT)
TOKENS = st.lists(COUNT, max_size=30).map(tuple)
PAIR = st.tuples(COUNT, FLOAT)
RULES = st.builds(
    LogitRules,
    repetition_penalty=FLOAT,
    presence_penalty=FLOAT,
    frequency_penalty=FLOAT,
    logit_bias=st.lists(PAIR, max_size=3).map(tuple),
    bad_words=st.lists(TOKENS, max_size=3).map(tuple),
)
REQUEST = st.builds(
    EngineRequest,
    request_id=TEXT,
    token_ids=TOKENS,
    adapter=st.none() | USE,
    max_tokens=COUNT,
    seed=st.integers(0, 2**64 - 1),
    temperature=FLOAT,
    top_p=FLOAT,
    top_k=st.none() | COUNT,
    min_p=FLOAT,
    rules=st.none() | RULES,
    stop_token_ids=TOKENS,
    min_tokens=COUNT,
    ignore_eos=st.booleans(),
    logprobs=st.none() | COUNT,
    prompt_logprobs=st.none() | COUNT,
)
LOGPROBS = st.lists(
    st.builds(PositionLogprobs, token_id=COUNT, logprob=FLOAT, top=st.lists(PAIR, max_size=3).map(tuple)), max_size=3
).map(tuple)
DELTA = st.builds(
    TokenDelta,
    request_id=TEXT,
    sample=COUNT,
    token_ids=TOKENS,
    logprobs=LOGPROBS,
    prompt_logprobs=LOGPROBS,
    queue_position=st.none() | COUNT,
    finish=st.none() | st.sampled_from(FinishReason),
    failure=st.none() | FAILURE,
)
POOL = st.builds(PoolStats, num_pages=COUNT, free=COUNT, sequences=COUNT, prefix=COUNT, adapters=COUNT)
RESIDENCY = st.builds(AdapterResidency, digest=TEXT, tier=st.sampled_from(Tier), num_pages=COUNT, pins=COUNT)
STATUS = st.builds(
    EngineStatus,
    pool=POOL,
    running=COUNT,
    waiting=COUNT,
    pins=COUNT,
    adapters=st.lists(RESIDENCY, max_size=3).map(tuple),
    counters=st.builds(EngineCounters, steps=COUNT, preemptions=COUNT),
)
INFO = st.builds(
    EngineInfo,
    device=TEXT,
    dtype=TEXT,
    vocab_size=COUNT,
    context_tokens=COUNT,
    block_tokens=COUNT,
    page_bytes=COUNT,
    num_pages=COUNT,
)
CONFIG = st.builds(
    EngineConfig,
    model=st.builds(ModelConfig, path=TEXT, dtype=st.sampled_from(["float32", "bfloat16"]), seed=COUNT),
    pool=st.builds(PoolConfig, pool_bytes=st.integers(1, 2**50)),
    blob_root=st.none() | TEXT,
)
MESSAGES = st.one_of(
    st.builds(Configure, CONFIG),
    st.builds(Submit, REQUEST),
    st.builds(Cancel, TEXT),
    st.builds(GetStatus, COUNT),
    st.just(Shutdown()),
    st.builds(Ready, INFO),
    st.builds(Step, st.lists(DELTA, max_size=4).map(tuple)),
    st.builds(StatusReply, COUNT, STATUS),
    st.builds(Heartbeat, COUNT),
    st.builds(StartFailed, FAILURE),
)


@given(MESSAGES)
def test_a_message_survives_the_channel(message: Message) -> None:
    assert decode(encode(message)) == message


@given(st.binary(max_size=60))
def test_any_other_bytes_are_refused_or_are_a_message(data: bytes) -> None:
    try:
        message = decode(data)
    except (MalformedMessage, ConfigurationError):
        return
    assert decode(encode(message)) == message


@given(MESSAGES.filter(lambda message: len(encode(message)) > 1), st.data())
def test_a_truncated_message_is_refused(message: Message, data: st.DataObject) -> None:
    whole = encode(message)
    with pytest.raises(MalformedMessage):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))])


def test_the_refusal_says_what_is_wrong() -> None:
    with pytest.raises(MalformedMessage, match="empty"):
        decode(b"")
    with pytest.raises(MalformedMessage, match="tag 200"):
        decode(b"\xc8\x80")
    unknown_tier = msgspec.msgpack.encode({"request": {"request_id": 7}})
    with pytest.raises(MalformedMessage, match=r"Submit: .*request_id"):
        decode(encode(Submit(_request()))[:1] + unknown_tier)


def test_settings_are_checked_again_on_arrival() -> None:
    config = EngineConfig(model=ModelConfig(path="m"))
    fields = dataclasses.asdict(config)
    fields["pool"]["block_tokens"] = 0
    with pytest.raises(ConfigurationError, match="block_tokens 0"):
        decode(encode(Configure(config))[:1] + msgspec.msgpack.encode({"config": fields}))


def test_an_error_that_quotes_a_strange_file_name_can_be_sent() -> None:
    failure = failure_of(UnsupportedModel("no model in caf\udce9"))
    expected = Failure(reason="UNSUPPORTED_MODEL", message="no model in caf?")
    assert decode(encode(StartFailed(failure))) == StartFailed(expected)


def _request() -> EngineRequest:
    return EngineRequest(request_id="r", token_ids=(1,), adapter=None, max_tokens=1, seed=0)
