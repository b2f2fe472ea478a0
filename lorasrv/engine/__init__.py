"""The serving loop, in one process or behind a channel in its own."""
