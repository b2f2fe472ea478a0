"""`python -m lorasrv.cli`, where the `lorasrv` script is not on the path."""

from lorasrv.cli.main import app

app(prog_name="lorasrv")
