"""The committed generated code is what the .proto files give."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
GENERATED = ROOT / "lorasrv" / "v1"


def test_generated_code_is_fresh(tmp_path: Path) -> None:
    protos = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "proto/lorasrv/v1").glob("*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-Iproto", *outputs, *protos], cwd=ROOT, check=True)
    fresh = {path.name: path.read_bytes() for path in (tmp_path / "lorasrv" / "v1").iterdir()}
    committed = {path.name: path.read_bytes() for path in GENERATED.glob("*_pb2*")}
    assert len(fresh) == 3 * len(protos)
    assert committed == fresh, "run make proto"
