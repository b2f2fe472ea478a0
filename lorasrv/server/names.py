"""Resource names, read as those of the call's own tenant: a name may write it as `-`, and what is another tenant's is
not found. Raises InvalidReference for what is no name."""

from lorasrv.server.access import current_caller
from lorasrv_adapters.errors import AdapterNotFound, UploadNotFound, quote
from lorasrv_adapters.reference import (
    parse_adapter_name,
    parse_tag_name,
    parse_tenant_name,
    parse_upload_name,
    parse_version_name,
    tenant_name,
)


def own_tenant(name: str) -> str:
    tenant = parse_tenant_name(_full(name))
    if not _is_own(tenant):
        raise AdapterNotFound(f"tenant {quote(tenant)} not found")
    return tenant


def own_adapter(name: str) -> tuple[str, str]:
    """Tenant and adapter."""
    tenant, adapter_id = parse_adapter_name(_full(name))
    if not _is_own(tenant):
        raise AdapterNotFound(f"adapter {quote(adapter_id)} not found")
    return tenant, adapter_id


def own_version(name: str) -> tuple[str, str, str]:
    """Tenant, adapter and digest."""
    tenant, adapter_id, digest = parse_version_name(_full(name))
    if not _is_own(tenant):
        raise AdapterNotFound(f"adapter {quote(adapter_id)} not found")
    return tenant, adapter_id, digest


def own_tag(name: str) -> tuple[str, str, str]:
    """Tenant, adapter and tag."""
    tenant, adapter_id, tag = parse_tag_name(_full(name))
    if not _is_own(tenant):
        raise AdapterNotFound(f"adapter {quote(adapter_id)} not found")
    return tenant, adapter_id, tag


def own_upload(name: str) -> tuple[str, str]:
    """Tenant and upload."""
    tenant, upload_id = parse_upload_name(_full(name))
    if not _is_own(tenant):
        raise UploadNotFound(f"upload {quote(upload_id)} not found")
    return tenant, upload_id


def _full(name: str) -> str:
    """The name with the caller's tenant in the place of `-`."""
    own, _, rest = name.partition("/-")
    return f"{tenant_name(current_caller().tenant)}{rest}" if own == "tenants" and rest[:1] in ("", "/") else name


def _is_own(tenant: str) -> bool:
    return tenant == current_caller().tenant
