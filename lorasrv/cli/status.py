"""`lorasrv status`: what a server is doing."""

from rich.table import Table

from lorasrv.cli.connection import UrlOption, connect
from lorasrv.cli.output import JsonOption, message_dict, print_json, print_table
from lorasrv.v1 import adapter_pb2, server_pb2


def status(url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Show the server's requests, its page pool and where its adapters are."""
    with connect(url) as client:
        info, now = client.info(), client.status()
        if as_json:
            print_json({"server": message_dict(info), "status": message_dict(now)})
        else:
            print_status(info, now)


def print_status(info: server_pb2.ServerInfo, now: server_pb2.ServerStatus) -> None:
    """Requests, pages by owner, and adapters by tier."""
    state = server_pb2.EngineState.Name(now.state).removeprefix("ENGINE_STATE_").lower()
    model, pool = info.base_model, now.pool
    print(f"{model.name} ({model.architecture}, {model.dtype} on {model.device}): {state}")
    print(f"requests: {now.running_requests} running, {now.waiting_requests} waiting")
    print(
        f"pages: {pool.num_pages} of {info.page_bytes} bytes; {pool.free_pages} free, "
        f"{pool.sequence_pages} sequences, {pool.prefix_pages} prefix cache, {pool.adapter_pages} adapters"
    )
    if now.adapters:
        table = Table("adapter", "version", "tier", "pages", "pins", box=None)
        for adapter in now.adapters:
            tier = adapter_pb2.Tier.Name(adapter.tier).removeprefix("TIER_").lower()
            table.add_row(
                adapter.adapter_id, adapter.version_digest[:12], tier, str(adapter.num_pages), str(adapter.pins)
            )
        print_table(table)
        for adapter in now.adapters:
            if adapter.failure:
                print(f"{adapter.adapter_id}: the last load failed: {adapter.failure}")
