"""`lorasrv demo`: a server of its own, streams of all sample adapters at once, every output checked to the letter."""
