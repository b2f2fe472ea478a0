"""The one table from errors to gRPC statuses: complete, bounded, and silent about what is not for callers."""

from typing import TypeVar

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from lorasrv.errors import InvalidRequest, LorasrvError, QueueFull
from lorasrv.server.status import MASKED_MESSAGE, MAX_REASONS, MAX_STATUS_BYTES, OUTCOMES, describe
from lorasrv_adapters.errors import (
    AdapterError,
    ContentError,
    ContentRefused,
    InvalidAdapter,
    OffsetMismatch,
    RankTooLarge,
    UnsupportedFeature,
)

T = TypeVar("T", bound=Message)


def tree(kind: type) -> set[type]:
    return {kind}.union(*(tree(child) for child in kind.__subclasses__()))


def rich(status: grpc.Status) -> status_pb2.Status:
    ((_, packed),) = status.trailing_metadata
    return status_pb2.Status.FromString(packed)


def detail(status: grpc.Status, kind: type[T]) -> T | None:
    found = kind()
    return next((found for each in rich(status).details if each.Unpack(found)), None)


def info(status: grpc.Status) -> error_details_pb2.ErrorInfo:
    found = detail(status, error_details_pb2.ErrorInfo)
    assert found is not None
    return found


def test_every_error_class_has_its_own_row() -> None:
    ours = {kind for kind in tree(LorasrvError) | tree(AdapterError) if kind.__module__.startswith("lorasrv")}
    assert ours == set(OUTCOMES)


def test_reasons_are_stable_names_and_codes_are_errors() -> None:
    for kind, outcome in OUTCOMES.items():
        assert kind.reason.replace("_", "").isupper(), kind
        assert outcome.code is not grpc.StatusCode.OK
        assert outcome.code is not grpc.StatusCode.UNKNOWN


def test_an_invalid_request_names_its_field() -> None:
    status = describe(InvalidRequest("sampling.top_p", "2.0 is not within (0, 1]"))
    assert status.code is grpc.StatusCode.INVALID_ARGUMENT
    assert (info(status).domain, info(status).reason) == ("lorasrv", "INVALID_REQUEST")
    bad = detail(status, error_details_pb2.BadRequest)
    assert bad is not None
    assert [violation.field for violation in bad.field_violations] == ["sampling.top_p"]
    assert "2.0" in status.details


def test_a_full_queue_says_when_to_come_back() -> None:
    retry = detail(describe(QueueFull("2048 requests wait")), error_details_pb2.RetryInfo)
    assert retry is not None
    assert retry.retry_delay.seconds == 1


def test_a_wrong_offset_tells_the_current_one() -> None:
    status = describe(OffsetMismatch("offset 5 is not 3", current=3))
    assert status.code is grpc.StatusCode.OUT_OF_RANGE
    assert info(status).metadata["current_offset"] == "3"


def test_refused_content_has_the_code_and_reason_that_its_reasons_share() -> None:
    limit, feature, wrong = RankTooLarge("rank 512"), UnsupportedFeature("bias"), InvalidAdapter("r is 0")
    one = describe(ContentRefused([limit]))
    assert (one.code, info(one).reason) == (grpc.StatusCode.FAILED_PRECONDITION, "RANK_TOO_LARGE")
    two = describe(ContentRefused([limit, feature]))
    assert (two.code, info(two).reason) == (grpc.StatusCode.FAILED_PRECONDITION, "CONTENT_REFUSED")
    listed = detail(two, error_details_pb2.PreconditionFailure)
    assert listed is not None
    assert [violation.type for violation in listed.violations] == ["RANK_TOO_LARGE", "UNSUPPORTED_FEATURE"]
    mixed = describe(ContentRefused([limit, wrong]))
    assert mixed.code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("num_reasons", [1, 19, 20, 21, 500])
@pytest.mark.parametrize("text", ["short", "x" * 3000, "ü" * 900])
def test_a_status_stays_within_its_bounds(num_reasons: int, text: str) -> None:
    errors: list[ContentError] = [InvalidAdapter(f"{index} {text}") for index in range(num_reasons)]
    status = describe(ContentRefused(errors))
    assert rich(status).ByteSize() <= MAX_STATUS_BYTES
    assert info(status).metadata["num_reasons"] == str(num_reasons)
    bad = detail(status, error_details_pb2.BadRequest)
    assert bad is not None
    assert 1 <= len(bad.field_violations) <= min(num_reasons, MAX_REASONS)


def test_other_errors_say_nothing_about_themselves() -> None:
    status = describe(RuntimeError("/srv/secret/path"))
    assert (status.code, status.details) == (grpc.StatusCode.INTERNAL, MASKED_MESSAGE)
    assert info(status).reason == "INTERNAL"
    assert b"secret" not in rich(status).SerializeToString()
