"""What the operator allows, for each tenant alike."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class RegistryLimits:
    """`tenant_bytes` bounds what a tenant stores, uploads under way and deleted adapters included; None does not.

    A deleted adapter can be undeleted for `retention_s`; an upload ends `upload_ttl_s` after it was created. A tenant
    imports from the folder of its name in `import_root`; None forbids imports.
    """

    tenant_bytes: int | None = None
    open_uploads: int = 1000
    pinned_adapters: int = 16
    upload_ttl_s: float = 24 * 3600.0
    retention_s: float = 7 * 24 * 3600.0
    import_root: Path | None = None
