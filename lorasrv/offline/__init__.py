"""The parts of the offline face, `lorasrv.LLM`: the engine driven by whoever waits for it, in this process."""
