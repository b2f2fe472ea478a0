"""docs/api.md is what the proto files and the table of errors give."""

import subprocess
import sys
from pathlib import Path

from lorasrv.server.status import OUTCOMES
from lorasrv.v1 import adapter_pb2, generation_pb2, server_pb2
from running_server import subprocess_env

ROOT = Path(__file__).parent.parent


def test_the_api_page_is_fresh() -> None:
    program = "import generate_api, sys; sys.stdout.write(generate_api.api())"
    command = [sys.executable, "-c", program]
    fresh = subprocess.run(command, cwd=ROOT / "docs", env=subprocess_env(), capture_output=True, check=False)
    assert fresh.returncode == 0, fresh.stderr.decode()
    assert (ROOT / "docs" / "api.md").read_text() == fresh.stdout.decode(), "run make docs"


def test_the_api_page_has_every_method_message_field_value_and_reason() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    for file in (generation_pb2.DESCRIPTOR, adapter_pb2.DESCRIPTOR, server_pb2.DESCRIPTOR):
        for service in file.services_by_name.values():
            for method in service.methods:
                assert f"### {service.name}.{method.name}\n" in page
        for message in file.message_types_by_name.values():
            section = page.partition(f"\n### {message.name}\n")[2].partition("\n#")[0]
            assert [field.name for field in message.fields if f"\n| {field.name} |" not in section] == []
        for enum in file.enum_types_by_name.values():
            assert [value.name for value in enum.values if f"\n| {value.name} |" not in page] == []
    assert [kind.reason for kind in OUTCOMES if f"\n| {kind.reason} |" not in page] == []
