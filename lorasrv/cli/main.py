"""`lorasrv`: one command, a verb per file."""

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lorasrv import __version__
from lorasrv.cli import adapters, bench, chat, context, demo, doctor, generate, keys, serve, simulate, status
from lorasrv.cli.connection import CONTEXT_VARIABLE
from lorasrv.cli.output import EXIT_CODES, reported_errors


class _Verbs(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        with reported_errors():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_Verbs,
    help="Serve one base model with thousands of LoRA adapters.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("serve")(serve.serve)
app.command("demo")(demo.demo)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("status")(status.status)
app.command("doctor")(doctor.doctor)
app.command("simulate")(simulate.simulate)
app.add_typer(adapters.app, name="adapters")
app.add_typer(bench.app, name="bench")
app.add_typer(context.app, name="context")
app.add_typer(keys.app, name="keys")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lorasrv {__version__}")
        raise typer.Exit


@app.callback()
def lorasrv(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    context_name: Annotated[
        str | None,
        typer.Option(
            "--context",
            metavar="NAME",
            help=f"The server that lorasrv context add has named so. Else {CONTEXT_VARIABLE}.",
            autocompletion=context.complete_context,
        ),
    ] = None,
) -> None:
    """Serve one base model with thousands of LoRA adapters."""
