"""Adapter formats, validation, registry, and the host cache of page images. Needs no torch."""
