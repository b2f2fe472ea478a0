"""Addresses, as clients and the server read them: HOST:PORT, and whether that is this machine."""

import ipaddress
import re

# An IPv6 address stands in brackets: gRPC takes ::1:8470 for the address ::1:8470 and some port.
_ADDRESS = re.compile(r"(\[[^\[\]\s]+\]|[^\[\]:/@\s]*):([0-9]{1,5})")


def host_and_port(address: str) -> tuple[str, int]:
    """The two of HOST:PORT; the brackets of an IPv6 address are part of its host. Raises ValueError."""
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ValueError(f"{address!r} is not HOST:PORT, with an IPv6 address in brackets")
    host, port = found[1], int(found[2])
    if port > 65535:
        raise ValueError(f"{address!r}: port {port} is above 65535")
    return host, port


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
