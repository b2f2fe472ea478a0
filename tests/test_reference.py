"""References and resource names: one parser, the same for every front end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasrv_adapters import reference as ref
from lorasrv_adapters.errors import InvalidReference


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("base", ref.BaseReference()),
        ("a", ref.TagReference(adapter_id="a", tag="latest")),
        ("my.lora-1_x", ref.TagReference(adapter_id="my.lora-1_x", tag="latest")),
        ("a@prod", ref.TagReference(adapter_id="a", tag="prod")),
        ("a@sha256:01234567", ref.DigestReference(adapter_id="a", prefix="01234567")),
        ("a@sha256:" + "f" * 64, ref.DigestReference(adapter_id="a", prefix="f" * 64)),
        ("z" * 63, ref.TagReference(adapter_id="z" * 63, tag="latest")),
    ],
)
def test_accepts(text: str, parsed: object) -> None:
    assert ref.parse_reference(text) == parsed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "@",
        "@prod",
        "a@",
        "a@@b",
        "A",
        "Upper",
        "a b",
        "a\0",
        "a\n",
        "-a",
        "a-",
        ".a",
        "a.",
        "z" * 64,
        "../a",
        "a/b",
        "\u0430dapter",
        "base@latest",
        "base@sha256:01234567",
        "a@sha256:",
        "a@sha256:0123456",
        "a@sha256:" + "f" * 65,
        "a@sha256:0123456G",
        "a@SHA256:01234567",
        "a@sha256:ABCDEF01",
        "a@Prod",
        "\u202ea",
    ],
)
def test_refuses(text: str) -> None:
    with pytest.raises(InvalidReference) as refused:
        ref.parse_reference(text)
    assert str(refused.value).isascii()
    assert str(refused.value).isprintable()


@given(st.text())
def test_parses_to_itself_or_refuses(text: str) -> None:
    try:
        parsed = ref.parse_reference(text)
    except InvalidReference:
        return
    if not isinstance(parsed, ref.BaseReference):
        assert str(parsed) in (text, f"{text}@latest")
        assert ref.parse_reference(str(parsed)) == parsed


def test_resource_names_round_trip() -> None:
    assert ref.parse_tenant_name(ref.tenant_name("acme")) == "acme"
    assert ref.parse_adapter_name(ref.adapter_name("acme", "upper")) == ("acme", "upper")
    assert ref.parse_upload_name(ref.upload_name("acme", "0f")) == ("acme", "0f")
    assert ref.version_name("acme", "upper", "ab") == "tenants/acme/adapters/upper/versions/ab"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "upper",
        "tenants/acme",
        "tenants//adapters/a",
        "tenants/a/adapters/B",
        "tenants/a/adapters/b/",
        "/tenants/a/adapters/b",
        "tenants/../adapters/b",
        "tenants/a/uploads/b",
        "tenants/a/adapters/base",
    ],
)
def test_refuses_adapter_names(name: str) -> None:
    with pytest.raises(InvalidReference):
        ref.parse_adapter_name(name)
