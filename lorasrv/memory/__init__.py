"""Accounting of the page pool (integers only), and in `storage` the bytes themselves."""
