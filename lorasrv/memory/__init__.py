"""The page pool: accounting, in integers only, and beside it what holds, packs and copies the bytes."""
