"""What processes of a test do; in a module of its own, so that the server of `several` can import it."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from over_nccl import OverNccl
from several import run
from several_recipes import DEVICE
from torch import nn

from linearize import cli, distill, launched, storing
from linearize.config.budget import parse
from linearize.config.schema import RunConfig, StageConfig
from linearize.distill import processes, rates, runner, together, watch
from linearize.distill.callbacks import Interrupt, StageCallback
from linearize.distill.device import resolve_device
from linearize.distill.finetune import FinetuneTrainer
from linearize.distill.micro import MicroBatch
from linearize.distill.stage import StageTrainer
from linearize.distill.transfer import TransferTrainer
from linearize.errors import DataError


def signalled(
    model: str, recipe: Any, out: Path, number: int, rank: int, place: tuple[str, int], resume: bool
) -> None:
    """A signal to one process at the end of a step of a stage."""
    original = StageCallback.on_step_end

    def on_step_end(self: StageCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (self.trainer.stage_name, state.global_step) == place and launched.rank() == rank:
            os.kill(os.getpid(), number)
        original(self, args, state, control, **kwargs)

    StageCallback.on_step_end = on_step_end  # type: ignore[method-assign]
    run(model, recipe, out, resume)


def slow_to_write(model: str, recipe: Any, out: Path) -> None:
    """SIGTERM, and a first process whose checkpoint takes a while; the second says which one is there when it ends."""
    original = StageTrainer._save_checkpoint

    def save(self: StageTrainer, *given: Any) -> None:
        if launched.first() and self.interrupt.obeyed:
            time.sleep(2)
        original(self, *given)

    StageTrainer._save_checkpoint = save  # type: ignore[method-assign]
    try:
        signalled(model, recipe, out, signal.SIGTERM, 1, ("transfer", 2), False)
    finally:
        if not launched.first():
            (out.parent / "seen.txt").write_text(storing.latest(out / "stage-1-transfer").name)


def pressed_twice(model: str, recipe: Any, out: Path) -> None:
    """Ctrl-C of a terminal, which a launcher hands on once more to all processes."""
    original = StageCallback.on_step_end

    def on_step_end(self: StageCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        original(self, args, state, control, **kwargs)

    StageCallback.on_step_end = on_step_end  # type: ignore[method-assign]
    run(model, recipe, out)


def not_finite(model: str, recipe: Any, out: Path) -> None:
    """In step 3 of the second stage the second process has a gradient that is not finite."""
    original = FinetuneTrainer.micro_step

    def micro_step(self: FinetuneTrainer, *given: Any) -> torch.Tensor:
        found = original(self, *given)
        if launched.rank() == 1 and self.state.global_step == 2:
            next(iter(self.parameters.values())).grad.fill_(float("nan"))
        return found

    FinetuneTrainer.micro_step = micro_step  # type: ignore[method-assign]
    run(model, recipe, out)


def out_of_memory(model: str, recipe: Any, out: Path) -> None:
    """The second process never holds more than one sequence at once."""
    original = TransferTrainer.micro_step

    def micro_step(
        self: TransferTrainer, module: nn.Module, batch: dict[str, Any], count: Any
    ) -> torch.Tensor:
        if launched.rank() == 1 and len(batch["input_ids"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return original(self, module, batch, count)

    save = StageTrainer._save_checkpoint

    def note(self: StageTrainer, *given: Any) -> None:
        (out.parent / f"sizes-{launched.rank()}.txt").write_text(str(self.micro.size))
        save(self, *given)

    TransferTrainer.micro_step = micro_step  # type: ignore[method-assign]
    StageTrainer._save_checkpoint = note  # type: ignore[method-assign]
    run(model, recipe, out)


def failing_first(model: str, recipe: Any, out: Path) -> None:
    """What the first process does alone fails."""

    def measure(*_: Any, **__: Any) -> dict[str, Any]:
        raise DataError("the text is upside down")

    runner.Measurer.measure = measure  # type: ignore[method-assign]
    run(model, recipe, out)


def experts(out: Path) -> None:
    """Parameters that get gradients in one process, in none, and in all; an odd layout among them."""
    device = resolve_device(RunConfig(device=DEVICE))
    with processes.joined(device), OverNccl() as spoken:
        rank = processes.rank()
        sizes = [(3,), (2, 2), (5,), (4, 3)]
        parameters = [nn.Parameter(torch.zeros(size, device=device)) for size in sizes]
        parameters[0].grad = torch.full((3,), 1.0 + rank, device=device)
        parameters[1].grad = torch.ones(2, 2, device=device) if rank == 1 else None
        turned = torch.arange(12.0, device=device).view(3, 4).t()
        parameters[3].grad = turned * (1 + rank)
        values = torch.tensor([0.25, 0.5], device=device) * (1 + rank)
        stage = StageConfig(batch_size=4, micro_batch="auto")
        micro = MicroBatch(stage, "experts", [(4, 8)], torch.device("cpu"))
        micro.size, micro.halved = 1, rank == 1
        interrupt = Interrupt()
        interrupt.requested = rank == 1
        processes.BUCKET = 14
        together.join(parameters, values, micro, (4, 8), interrupt)
        assert values.tolist() == [0.75, 1.5]
        assert parameters[0].grad.tolist() == [3.0] * 3
        assert parameters[1].grad.tolist() == [[1.0] * 2] * 2
        assert parameters[2].grad is None
        assert torch.equal(parameters[3].grad, 3 * turned)
        single = turned * (1 + rank)
        processes.add_up([single])
        assert torch.equal(single, 3 * turned)
        processes.same([single.mul_(1 + rank)])
        assert torch.equal(single, 3 * turned) and not single.is_contiguous()
        assert {"allreduce_", "broadcast_"} <= {name.partition(".")[0] for name in spoken.seen}
        assert micro.sizes == {(4, 8): 1} and interrupt.obeyed and interrupt.wish == 130
        drawn = []
        for step in (0, 1):
            processes.random_apart(7, step)
            drawn.append(float(torch.rand(())))
        (out / f"drawn-{rank}.txt").write_text(" ".join(map(str, drawn)))


SECONDS = 3000
"""Of a budget that is planned and not spent: what a busy machine times by a clock that is fifty times too fast fits."""


def in_a_time(model: str, recipe: Any, out: Path) -> None:
    """A budget of time, by clocks of which the second runs fifty times as fast; planned alone."""
    real, started = time.monotonic, time.monotonic()
    if launched.rank() == 1:
        rates.time = SimpleNamespace(monotonic=lambda: started + 50 * (real() - started))
    original = runner._Job._fit

    def stop(self: Any, budget: Any) -> Any:
        facts = original(self, budget)
        stages = {name: [stage.tokens, stage.batch_size] for name, stage in self.recipe.stages.items()}
        found = {"stages": stages, "seconds": facts["planned_seconds"], "timed": facts["timed"]}
        (out.parent / f"planned-{launched.rank()}.json").write_text(json.dumps(found))
        raise KeyboardInterrupt

    runner._Job._fit = stop  # type: ignore[method-assign]
    distill.run(model, recipe, out, budget=parse(f"{SECONDS}s"))


def waiting_on_a_card(model: str, recipe: Any, out: Path) -> None:
    """The second process dies in a pass, and the first one's waits for it without an error, as NCCL does."""
    original = FinetuneTrainer.micro_step

    def micro_step(self: FinetuneTrainer, *given: Any) -> torch.Tensor:
        if self.state.global_step == 2:
            if launched.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return original(self, *given)

    FinetuneTrainer.micro_step = micro_step  # type: ignore[method-assign]
    watch.PATIENCE = 1.0
    run(model, recipe, out)


def all_recipes(model: str, recipes: dict[str, Any], out: Path) -> None:
    """Every recipe by both processes together, and before half of them by each alone."""
    own = dict(list(recipes.items())[launched.rank() :: launched.count()])
    kept = {name: os.environ.pop(name) for name in launched.VARIABLES if name in os.environ}
    for name, recipe in own.items():
        run(model, recipe, out / "one" / name)
    os.environ.update(kept)
    with processes.joined(torch.device("cpu")):
        runner.processes.joined = lambda *_: nullcontext()  # once for all, since a store outlives its run
        for name, recipe in recipes.items():
            run(model, recipe, out / "two" / name)


def command(line: list[str]) -> None:
    """`linearize` with these arguments; all that it says is kept."""
    with redirect_stdout(sys.stderr):
        code = cli.main(line)
    assert code == 0, code
