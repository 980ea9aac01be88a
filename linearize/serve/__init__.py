"""Serving a checkpoint: over HTTP by the decoding of rows (`linearize.decode.slots`), and in vLLM."""
