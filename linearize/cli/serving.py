"""`linearize serve PATH`: a model behind OpenAI's interface."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from linearize.console import size
from linearize.errors import LinearizeError
from linearize.extras import install

log = logging.getLogger(__name__)

TOKEN = "LINEARIZE_TOKEN"
PARTS = ("prometheus_client", "starlette", "uvicorn")


def main(options: argparse.Namespace) -> int:
    """Load the model, say where it is served, and answer until asked to stop."""
    from linearize.cli.checkpoint import export_of, load
    from linearize.models import resolve
    from linearize.serve import through_vllm
    from linearize.serve.settings import Settings, bound

    token = options.token if options.token is not None else os.environ.get(TOKEN)
    if token is not None and (not token.strip() or not token.isascii() or token != token.strip()):
        raise LinearizeError(
            f"--token or {TOKEN}: must be ASCII text without spaces around it, and not empty (leave it out for none)"
        )
    settings = Settings(
        name=options.name or _name(options.path),
        host=options.host,
        port=options.port,
        token=token,
        slots=options.slots,
        queue=options.queue,
        prompt=options.max_prompt_tokens,
        new=options.max_new_tokens,
        piece=options.piece,
        prompts=options.prompts,
        body=options.max_body,
        seconds=options.timeout,
        grace=options.grace,
        graph=not options.no_graph,
    )
    if options.engine == "vllm" and not through_vllm.installed():
        raise LinearizeError(
            f"--engine vllm: vLLM is not installed; {install('vllm')}, or take --engine slots"
        )
    if options.engine != "slots" and through_vllm.installed():
        folder = Path(resolve(export_of(options.path)))
        obstacles = through_vllm.obstacles(settings, folder, options.device)
        if not obstacles:
            with bound(settings) as listening:
                port = listening.getsockname()[1]
            log.info(
                "serving '%s' by vLLM's server on port %d; --engine slots takes ours", settings.name, port
            )
            through_vllm.replace_process(settings, folder, port)
        if options.engine == "vllm":
            raise LinearizeError(
                f"--engine vllm: {'; '.join(obstacles)}; leave that out, or take --engine slots"
            )
        log.info("by slots, though vLLM is installed: %s", "; ".join(obstacles))
    try:
        from linearize.serve.server import Served
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in PARTS:
            raise
        raise LinearizeError(
            f"serving needs {error.name}, which is not installed: {install('serve')}"
        ) from None
    with bound(settings) as listening:  # before the seconds that the model takes
        model, tokenizer = load(options.path, options.device)
        served = Served(model, tokenizer, settings)
        port = listening.getsockname()[1]
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        each = size(served.slots.bytes / settings.slots)
        chat = (
            "" if getattr(tokenizer, "chat_template", None) else ", no chat (the tokenizer has no template)"
        )

        def ready() -> None:
            log.info(
                "serving '%s' on http://%s:%d/v1 (%s, %d slots of %s%s); Ctrl-C stops",
                settings.name, host, port, served.slots.device, settings.slots, each, chat,
            )  # fmt: skip

        served.run(listening, ready)
    log.info("stopped")
    return 0


def _name(path: str) -> str:
    """The last part of a path that says something: of `runs/demo/checkpoint` it is demo."""
    parts = [part for part in Path(path).parts if part not in ("checkpoint", ".", "..", "/")]
    return parts[-1] if parts else "model"
