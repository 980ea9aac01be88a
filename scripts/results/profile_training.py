"""Where a training step's time goes: wall time, time in GPU kernels, and the kernels that take most of it.

Random weights in SmolLM2-135M's shape, so nothing is downloaded; the lolcats recipe's mixer and losses.

    python scripts/results/profile_training.py [--batch 16] [--length 1024] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from linearize import surgery
from linearize.config import compose
from linearize.config.schema import LoraConfig, StageConfig
from linearize.distill.finetune import predict
from linearize.distill.trainable import prepare
from linearize.distill.transfer import transfer_step
from linearize.objectives import next_targets, token_backward

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def measure(step: Callable[[], None], tokens: int, repeats: int = 5) -> dict[str, object]:
    """Median wall time of a step, its GPU time, and its longest kernels, in milliseconds."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    walls = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        walls.append(1e3 * (time.perf_counter() - start))
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in recorded.key_averages() if event.self_device_time_total > 0]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    wall = sorted(walls)[repeats // 2]
    return {
        "wall_ms": round(wall, 1),
        "gpu_ms": round(sum(event.self_device_time_total for event in kernels) / 1e3, 1),
        "kernels": sum(event.count for event in kernels),
        "tokens_per_second": round(tokens / wall * 1e3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "longest": [[e.key[:70], e.count, round(e.self_device_time_total / 1e3, 2)] for e in kernels[:12]],
    }


def main() -> None:
    """Measure both stages and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    recipe = compose("lolcats", [])
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=torch.float32).cuda().eval()
    surgery.convert(model, recipe.mixer, recipe.layers)
    ids = torch.randint(0, SHAPE["vocab_size"], (options.batch, options.length), device="cuda")
    positions = torch.arange(options.length, device="cuda").remainder(700).expand(options.batch, -1)
    batch = {"input_ids": ids, "position_ids": positions, "labels": ids}
    results: dict[str, object] = {"device": torch.cuda.get_device_name(), "tokens": ids.numel()}

    def autocast() -> torch.autocast:
        return torch.autocast("cuda", dtype=torch.bfloat16, cache_enabled=False)

    def teacher() -> None:
        with torch.no_grad(), autocast(), surgery.mode(model, "teacher"):
            model.base_model(input_ids=ids, position_ids=positions, use_cache=False)

    def transfer() -> None:
        with autocast():
            transfer_step(model, batch, {"attention_output": 1000.0})

    results["teacher forward"] = measure(teacher, ids.numel())
    prepare(model, StageConfig(train=["mixers"]))
    torch.cuda.reset_peak_memory_stats()
    results["transfer"] = measure(transfer, ids.numel())
    adapted = prepare(model, StageConfig(train=["lora"], lora=LoraConfig()))
    adapted.train()

    def recover() -> None:
        with autocast():
            logits = predict(adapted, batch)
        token_backward(logits, next_targets(ids, positions), {"next_token": 1.0})

    torch.cuda.reset_peak_memory_stats()
    results["recover"] = measure(recover, ids.numel())
    for name, row in results.items():
        if isinstance(row, dict):
            print(
                f"{name:16} wall {row['wall_ms']:8} ms   gpu {row['gpu_ms']:8} ms   {row['kernels']:6} kernels"
            )
            print(f"{'':16} {row['tokens_per_second']:,} tokens/s, peak {row['peak_gib']} GiB")
            for kernel, count, spent in row["longest"]:
                print(f"    {spent:8} ms {count:6} x {kernel}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
