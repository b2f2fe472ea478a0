"""A published version, opened for its weights. An engine process needs the blob folder and a digest, no catalogue."""

from dataclasses import dataclass
from pathlib import Path

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
    validate_folder,
)


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """What a packer needs: `spec` says where in `weights_file` each matrix lies."""

    digest: str
    spec: AdapterSpec
    weights_file: Path
    size_bytes: int


def open_version(blobs: BlobStore, digest: str, base: BaseShapes, max_rank: int) -> AdapterFiles:
    """Read a version's manifest, configuration and header; every byte is checked against the digest.

    Raises CorruptBlob when stored bytes are missing or damaged, ContentRefused when `base` is not the base model
    that the version was validated against.
    """
    manifest = read_manifest(blobs, digest)
    config_file, weights_file = manifest.file(CONFIG_FILE), manifest.file(WEIGHTS_FILE)
    config_bytes = blobs.read_verified(config_file.sha256, MAX_CONFIG_BYTES)
    if manifest.has(SERVING_FILE):
        # What it says was the front end's to read; its bytes are the version's all the same.
        blobs.read_verified(manifest.file(SERVING_FILE).sha256, MAX_SERVING_BYTES)
    blobs.verify(weights_file.sha256, weights_file.size_bytes)
    with blobs.open(weights_file.sha256) as weights:
        spec = read_spec(config_bytes, weights, base, max_rank)
    return AdapterFiles(
        digest=digest, spec=spec, weights_file=blobs.path(weights_file.sha256), size_bytes=manifest.size_bytes
    )


def open_folder(folder: Path, base: BaseShapes, max_rank: int, check: SpecCheck = accept_all) -> AdapterFiles:
    """A PEFT folder that no registry knows, validated in full; its digest is the one a registry would give it.

    Raises ContentRefused with every reason.
    """
    spec = validate_folder(folder, base, max_rank, check)
    files: list[ManifestFile] = []
    for name in FILE_NAMES if spec.serving is None else (*FILE_NAMES, SERVING_FILE):
        with open_regular(folder / name) as file:
            files.append(ManifestFile(name=name, sha256=file_sha256(file), size_bytes=file.tell()))
    manifest = make_manifest(files)
    return AdapterFiles(
        digest=manifest.digest, spec=spec, weights_file=folder / WEIGHTS_FILE, size_bytes=manifest.size_bytes
    )


def read_manifest(blobs: BlobStore, digest: str) -> Manifest:
    """A version's manifest; raises CorruptBlob."""
    try:
        return parse_manifest(blobs.read_verified(digest, MAX_MANIFEST_BYTES))
    except MalformedFile as error:
        raise CorruptBlob(f"version {digest}: {error}") from None
