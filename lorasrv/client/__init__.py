"""Client library; loads no torch."""
