"""Serving a converted checkpoint: in vLLM, and over HTTP."""
