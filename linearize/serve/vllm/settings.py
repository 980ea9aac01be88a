"""What vLLM is told before it starts, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from linearize.errors import UnsupportedModelError
from linearize.export.provenance import check_plan
from linearize.mixers import build
from linearize.serve.vllm.heads import problem, share
from linearize.serve.vllm.kinds import is_softmax, layer_shapes, name_kinds, sections, unserved
from linearize.serve.vllm.pages import Layout
from linearize.surgery.schema import FORMAT, plan_problems, upgraded


class LinearizedSettings(VerifyAndUpdateConfig):
    """Looked up by vLLM under the name of every architecture that this package exports."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        found = wrong(model_config.hf_config)
        if found:
            raise UnsupportedModelError(f"vLLM cannot serve {model_config.model}: {'; '.join(found[:5])}")
        check_plan(Path(model_config.model), model_config.hf_config)
        name_kinds(model_config.hf_config)

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        found = problems(vllm_config)
        if found:
            raise UnsupportedModelError(
                f"vLLM cannot serve {vllm_config.model_config.model}: {'; '.join(found)}"
            )


def page_bytes(config: Any, dtype: torch.dtype, ranks: int = 1) -> int:
    """Bytes of a page: the largest state among a checkpoint's layers, 0 where none holds one.

    Args:
        config: of the checkpoint, with its plan.
        dtype: in which the model computes.
        ranks: processes that share out the heads of a layer.
    """
    shapes = layer_shapes(config)
    with torch.device("meta"):
        mixers = [
            build(section, share(shapes[path], ranks))
            for path, section in sections(config).items()
            if not is_softmax(section)
        ]
        return max((Layout.of(mixer, dtype).bytes for mixer in mixers), default=0)


def wrong(config: Any) -> list[str]:
    """Mistakes of the plan in a checkpoint's config; empty where it can be read."""
    plan = upgraded(getattr(config, "linearize", None))
    if not isinstance(plan, dict) or plan.get("format") != FORMAT:
        return ["its config.json holds no plan of linearize that can be read; export or download it again"]
    return [f"config.linearize: {problem}; export or download it again" for problem in plan_problems(plan)]


def problems(vllm_config: Any) -> list[str]:
    """Why vLLM cannot serve a checkpoint with these settings, each with its remedy; empty where it can."""
    parallel = vllm_config.parallel_config
    found = []
    ranks = parallel.tensor_parallel_size
    uneven = (problem(shape, ranks) for shape in layer_shapes(vllm_config.model_config.hf_config).values())
    found += list(dict.fromkeys(why for why in uneven if why is not None))
    found += unserved(vllm_config.model_config.hf_config)
    for what, size in (
        ("pipeline_parallel_size", parallel.pipeline_parallel_size),
        ("decode_context_parallel_size", getattr(parallel, "decode_context_parallel_size", 1)),
    ):
        if size > 1:
            found.append(
                f"{what} is {size}, and a mixer's state is not cut along layers or tokens; leave it at 1"
            )
    if vllm_config.speculative_config is not None:
        found.append("speculative decoding takes tokens back, which a state cannot; leave it out")
    if vllm_config.lora_config is not None:
        found.append("LoRA adapters are not served beside it; merge them before the export")
    return found
