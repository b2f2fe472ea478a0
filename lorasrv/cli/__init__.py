"""The `lorasrv` command: verbs, no logic."""
