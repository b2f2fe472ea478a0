"""Client library; loads no torch."""

from lorasrv.client.aio import AsyncClient
from lorasrv.client.client import Client
from lorasrv.client.errors import ClientError
from lorasrv.client.messages import Generation

__all__ = ["AsyncClient", "Client", "ClientError", "Generation"]
