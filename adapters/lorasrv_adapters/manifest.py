"""The manifest of an adapter version: its files, in one canonical spelling whose sha256 names the version."""

import hashlib
import json
from dataclasses import dataclass

from lorasrv_adapters.errors import MalformedFile
from lorasrv_adapters.strict_json import parse_object

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SERVING_FILE = "serving.json"
FILE_NAMES = (CONFIG_FILE, WEIGHTS_FILE)
# What an adapter consists of, sorted.
FILE_SETS = (FILE_NAMES, (*FILE_NAMES, SERVING_FILE))
MAX_MANIFEST_BYTES = 64 << 10

_FORMAT = "lorasrv.adapter.v1"


@dataclass(frozen=True, kw_only=True)
class ManifestFile:
    name: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The kept files of a version, sorted by name."""

    files: tuple[ManifestFile, ...]

    def file(self, name: str) -> ManifestFile:
        return next(file for file in self.files if file.name == name)

    def has(self, name: str) -> bool:
        return any(file.name == name for file in self.files)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def to_bytes(self) -> bytes:
        """Canonical JSON: sorted keys, no spaces, ASCII."""
        files = [{"name": f.name, "sha256": f.sha256, "size_bytes": f.size_bytes} for f in self.files]
        return json.dumps({"files": files, "format": _FORMAT}, sort_keys=True, separators=(",", ":")).encode("ascii")

    @property
    def digest(self) -> str:
        """The version's name: sha256 of `to_bytes`, 64 hex digits."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


def make_manifest(files: list[ManifestFile]) -> Manifest:
    return Manifest(files=tuple(sorted(files, key=lambda file: file.name)))


def parse_manifest(data: bytes) -> Manifest:
    """Read `Manifest.to_bytes` back; raises MalformedFile on anything else than its canonical spelling."""
    fields = parse_object(data, "manifest")
    try:
        manifest = make_manifest(
            [ManifestFile(name=f["name"], size_bytes=f["size_bytes"], sha256=f["sha256"]) for f in fields["files"]]
        )
        canonical = manifest.to_bytes()
    except (KeyError, TypeError, ValueError):
        raise MalformedFile("manifest: not a list of files with name, size_bytes and sha256") from None
    if canonical != data or tuple(file.name for file in manifest.files) not in FILE_SETS:
        raise MalformedFile("manifest: not in its canonical spelling")
    return manifest
