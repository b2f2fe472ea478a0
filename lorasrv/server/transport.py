"""The port's TLS."""

import ssl
from pathlib import Path

import grpc

from lorasrv.errors import ConfigurationError


def tls_credentials(cert: str | None, key: str | None) -> grpc.ServerCredentials | None:
    """TLS from two PEM files, a certificate chain and its key; None without them. Raises ConfigurationError."""
    if cert is None or key is None:
        return None
    try:
        # gRPC would say no more than that the port cannot be bound.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
        return grpc.ssl_server_credentials([(Path(key).read_bytes(), Path(cert).read_bytes())])
    except ssl.SSLError as error:
        raise ConfigurationError(f"TLS: {cert} and {key} are not a certificate and its key: {error.reason}") from None
    except OSError as error:
        raise ConfigurationError(f"TLS: {cert} and {key}: {error.strerror}") from None
