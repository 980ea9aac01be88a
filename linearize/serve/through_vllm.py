"""The same model behind vLLM's own server of OpenAI's interface, in the place of this process."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from linearize.errors import LinearizeError
from linearize.serve.settings import Settings

NAMES = {
    "queue": "--queue",
    "body": "--max-body",
    "seconds": "--timeout",
    "grace": "--grace",
    "piece": "--piece",
    "prompts": "--prompts",
}
"""Settings of the slots that vLLM's server has no counterpart of, as the command line calls them."""


CACHE = 4 * 2**30
"""Bytes of states and keys on a CPU; if nobody says, vLLM takes 92 % of the memory, and ends where less is free."""


def installed() -> bool:
    """Whether vLLM can be imported."""
    return importlib.util.find_spec("vllm") is not None


def obstacles(settings: Settings, folder: Path, device: str) -> list[str]:
    """What was asked for that vLLM's server would pass over, each a phrase."""
    usual = Settings(name="")
    asked = [option for name, option in NAMES.items() if getattr(settings, name) != getattr(usual, name)]
    asked += [f"--device {device}"] if device != "auto" else []
    found = [f"it has no {', '.join(asked)}"] if asked else []
    if (folder / "adapter").is_dir():
        found.append(f"the adapter in {folder} is not merged")
    return found


def command(settings: Settings, folder: Path, port: int) -> list[str]:
    """The command line of vLLM's server; the token goes by VLLM_API_KEY, which no list of processes shows."""
    made = [sys.executable, "-m", *_server(), str(folder)]
    made += ["--served-model-name", settings.name, "--host", settings.host, "--port", str(port)]
    most = settings.prompt + settings.new
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    most = min(most, config.get("max_position_embeddings") or most)  # it refuses more
    made += ["--max-num-seqs", str(settings.slots), "--max-model-len", str(most)]
    if _on_cpu() and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        free = _free()
        made += ["--kv-cache-memory-bytes", str(min(CACHE, free // 2) if free else CACHE)]
    return made + ([] if settings.graph else ["--enforce-eager"])


def _server() -> list[str]:
    """The module that is `vllm serve`, which asks for a package of the name vllm; vllm-cpu 0.32 is none."""
    if _version("vllm") is None:
        return ["vllm.entrypoints.openai.api_server", "--model"]
    return ["vllm.entrypoints.cli.main", "serve"]


def _on_cpu() -> bool:
    """Whether what is installed is vLLM's build for the CPU, by its name or by its version (0.33.0+cpu)."""
    return _version("vllm-cpu") is not None or "cpu" in (_version("vllm") or "")


def _free() -> int:
    """Bytes that are free; 0 where the system does not tell."""
    from linearize.memory import machine  # which imports torch, and most of this file does without

    return machine()[0]


def _version(package: str) -> str | None:
    try:
        return distribution(package).version
    except PackageNotFoundError:
        return None


def replace_process(settings: Settings, folder: Path, port: int) -> None:
    """Become vLLM's server; does not return.

    Raises:
        LinearizeError: the process cannot be started.
    """
    if settings.token is not None:
        os.environ["VLLM_API_KEY"] = settings.token
    sys.stdout.flush()
    sys.stderr.flush()
    line = command(settings, folder, port)
    try:
        os.execv(line[0], line)
    except OSError as error:
        raise LinearizeError(
            f"vLLM's server cannot be started: {error.strerror}; take --engine slots"
        ) from error
