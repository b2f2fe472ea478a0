"""A version, opened for its weights. An engine process needs the blob folder and a digest, no catalogue."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from lorasrv_adapters.base import BaseShapes
from lorasrv_adapters.blobs import BlobStore, file_sha256
from lorasrv_adapters.errors import CorruptBlob, MalformedFile
from lorasrv_adapters.manifest import (
    CONFIG_FILE,
    FILE_NAMES,
    MAX_MANIFEST_BYTES,
    SERVING_FILE,
    WEIGHTS_FILE,
    Manifest,
    ManifestFile,
    make_manifest,
    parse_manifest,
)
from lorasrv_adapters.peft_format import (
    MAX_CONFIG_BYTES,
    MAX_SERVING_BYTES,
    AdapterSpec,
    SpecCheck,
    accept_all,
    open_regular,
    read_spec,
    validate_bytes,
    validate_folder,
)


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """What a packer needs: `spec` says where in `weights`, a file or its bytes, each matrix lies."""

    digest: str
    spec: AdapterSpec
    weights: Path | bytes
    size_bytes: int

    def open_weights(self) -> BinaryIO:
        return BytesIO(self.weights) if isinstance(self.weights, bytes) else self.weights.open("rb")


def open_version(
    blobs: BlobStore, digest: str, base: BaseShapes, max_rank: int, *, verify_weights: bool = True
) -> AdapterFiles:
    """Read a version's manifest, configuration and header; every byte is checked against the digest, those of the
    weights unless that is for later.

    Raises CorruptBlob when stored bytes are missing or damaged, ContentRefused when `base` is not the base model
    that the version was validated against.
    """
    manifest = read_manifest(blobs, digest)
    config_file, weights_file = manifest.file(CONFIG_FILE), manifest.file(WEIGHTS_FILE)
    config_bytes = blobs.read_verified(config_file.sha256, MAX_CONFIG_BYTES)
    if manifest.has(SERVING_FILE):
        # What it says was the front end's to read; its bytes are the version's all the same.
        blobs.read_verified(manifest.file(SERVING_FILE).sha256, MAX_SERVING_BYTES)
    if verify_weights:
        blobs.verify(weights_file.sha256, weights_file.size_bytes)
    with blobs.open(weights_file.sha256) as weights:
        spec = read_spec(config_bytes, weights, base, max_rank)
    return AdapterFiles(
        digest=digest, spec=spec, weights=blobs.path(weights_file.sha256), size_bytes=manifest.size_bytes
    )


def open_folder(folder: Path, base: BaseShapes, max_rank: int, check: SpecCheck = accept_all) -> AdapterFiles:
    """A PEFT folder that no registry knows, validated in full; its digest is the one a registry would give it.

    Raises ContentRefused with every reason.
    """
    spec = validate_folder(folder, base, max_rank, check)
    names = FILE_NAMES if spec.serving is None else (*FILE_NAMES, SERVING_FILE)
    with ExitStack() as files:
        manifest = _manifest({name: files.enter_context(open_regular(folder / name)) for name in names})
    return AdapterFiles(
        digest=manifest.digest, spec=spec, weights=folder / WEIGHTS_FILE, size_bytes=manifest.size_bytes
    )


def open_bytes(
    config_bytes: bytes, weights: bytes, base: BaseShapes, max_rank: int, check: SpecCheck = accept_all
) -> AdapterFiles:
    """The same of an adapter whose two files are in memory."""
    spec = validate_bytes(config_bytes, weights, base, max_rank, check)
    manifest = _manifest({CONFIG_FILE: BytesIO(config_bytes), WEIGHTS_FILE: BytesIO(weights)})
    return AdapterFiles(digest=manifest.digest, spec=spec, weights=weights, size_bytes=manifest.size_bytes)


def read_manifest(blobs: BlobStore, digest: str) -> Manifest:
    """A version's manifest; raises CorruptBlob."""
    try:
        return parse_manifest(blobs.read_verified(digest, MAX_MANIFEST_BYTES))
    except MalformedFile as error:
        raise CorruptBlob(f"version {digest}: {error}") from None


def verify_version(blobs: BlobStore, digest: str) -> Manifest:
    """Read all that a version consists of; raises CorruptBlob unless every byte is right."""
    manifest = read_manifest(blobs, digest)
    for file in manifest.files:
        blobs.verify(file.sha256, file.size_bytes)
    return manifest


def _manifest(files: Mapping[str, BinaryIO]) -> Manifest:
    return make_manifest(
        [ManifestFile(name=name, sha256=file_sha256(file), size_bytes=file.tell()) for name, file in files.items()]
    )
