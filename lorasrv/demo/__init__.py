"""`lorasrv demo`: a server, the sample adapters pushed to it, and streams of all of them at once, checked to the letter."""
