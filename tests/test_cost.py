"""The plan's formulas beside what was measured: memory within 15 %, time within 25 %, on every row of the file."""

import importlib.util
import json
from pathlib import Path

import odd
import pytest
import transformers
from tiny import config as family_config

from linearize import cli
from linearize.bench.subjects import SHAPES
from linearize.config import compose
from linearize.cost import blocks, memory, speed
from linearize.cost.cards import CARDS, cards
from linearize.cost.shapes import config_of
from linearize.cost.stages import plan, ways
from linearize.cost.strategy import fit, shares
from linearize.decode.newest import fits
from linearize.errors import CheckpointError, LinearizeError, UnsupportedModelError
from linearize.kernels.distill.slices import ELEMENTS
from linearize.models.layers import head_sizes, most

ROOT = Path(__file__).parents[1]


def of_the_command():
    """The module of the command that compares them."""
    found = importlib.util.spec_from_file_location("plan_check", ROOT / "scripts/results/plan_check.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


check = of_the_command()
ROWS = [row for name in check.FILES for row in check.rows(check.RESULTS / name)]
HELD = [row for row in ROWS if not check.gone(row)]


def sizes(shape, recipe, stage):
    return check.sizes_and_flops(shape, recipe, stage, 1024)[0]


@pytest.mark.parametrize(
    "row", HELD, ids=lambda row: f"{row['shape']}-{row['recipe']}-{row['stage']}-{row['commit']}"
)
def test_measured_rows(row):
    found = check.compared(row)
    assert not found["missed"], found


def test_a_row_that_is_missed_is_said(capsys, tmp_path):
    wrong = [{**HELD[0], "tokens_per_second": 2 * HELD[0]["tokens_per_second"]}, HELD[1]]
    (tmp_path / "rows.json").write_text(json.dumps(wrong))
    assert check.main([str(tmp_path / "rows.json")]) == 1
    assert "2 rows, 1 beyond" in capsys.readouterr().out


def test_superseded_rows_are_there():
    assert set(check.GONE) <= {row["commit"] for row in ROWS if row["stage"] == "transfer"} and len(HELD) > 20


def test_strategies():
    found = sizes("llama-3-8b", "lolcats", "all_kl")
    ways = [fit(found, "all_kl", 8, 2048, count, CARDS["h100"], checkpointing=False).way for count in (1, 8)]
    assert ways == ["none", "sharded"]
    found = sizes("llama-3-8b", "lolcats", "lora_kl")
    ways = [fit(found, "lora_kl", 8, 2048, count, CARDS["h100"], checkpointing=False).way for count in (1, 8)]
    assert ways == ["one card", "ddp"]


def test_a_stage_of_longer_and_longer_texts():
    """A pass takes a whole sequence at least, and the work of a token is the mean over the stage."""
    made, config = {}, config_of("smollm2-135m")
    for name, length, batch in (
        ("both", "[1024,8192]", "[64,2]"),
        ("short", "1024", "64"),
        ("long", "8192", "2"),
    ):
        changed = [f"stages.distill.data.length={length}", f"stages.distill.batch_size={batch}"]
        recipe = compose("best_constant", changed)
        made[name] = plan(config, recipe, 1, CARDS["h100"], model="m", name="best_constant").stages[-1]
    assert made["both"].shapes == [(64, 1024), (2, 8192)]
    assert (made["both"].batch, made["both"].length) == (2, 8192)
    assert made["both"].fit == made["long"].fit
    mean = (made["short"].flops + made["long"].flops) / 2
    assert (
        made["both"].flops == pytest.approx(mean, rel=1e-2)
        and made["short"].flops < 0.95 * made["long"].flops
    )


def test_what_a_run_asks_before_it_shards(tmp_path):
    """The ways of the plan itself; a teacher beside the model counts, unless it is kept elsewhere."""
    config, h100 = config_of("llama-3-8b"), CARDS["h100"]
    learned = ["stages.recover.objective={logits_kl: 1}", "stages.recover.micro_batch=1"]
    asked = [*learned, "stages.recover.train=[all]", "~stages.recover.lora"]
    expected = {
        stage.name: stage.fit.way
        for stage in plan(config, compose("lolcats", asked), 8, h100, model="", name="lolcats").stages
    }
    assert (
        ways(config, compose("lolcats", asked), 8, h100)
        == expected
        == {"transfer": "ddp", "recover": "sharded"}
    )
    large = tmp_path / "teacher"
    config_of("qwen3-32b").save_pretrained(large)
    beside = [*learned, f"run.teacher={large}"]
    assert ways(config, compose("lolcats", learned), 8, h100)["recover"] == "ddp"
    assert ways(config, compose("lolcats", beside), 8, h100)["recover"] == "sharded"
    for kept in ("run.teacher_device=cpu", "stages.recover.top_k=64"):
        assert ways(config, compose("lolcats", [*beside, kept]), 8, h100)["recover"] == "ddp", kept


def test_shards_spare_what_each_keeps_whole():
    """Mixers and adapters with their moments are on every card, base weights with theirs are not."""
    found = sizes("llama-3-8b", "lolcats", "all_kl")
    assert 0 < found.whole < 0.01 * found.total
    one, many = (shares(found, "all_kl", 2048, way, 64, True) for way in ("ddp", "sharded"))
    assert many["adamw"] == pytest.approx(8 * (found.whole + (found.trained - found.whole) / 64))
    assert many["teacher"] == one["teacher"] / 64 and many["activations"] == one["activations"]
    lora = sizes("llama-3-8b", "lolcats", "lora_kl")
    one, many = (shares(lora, "lora_kl", 2048, way, 64, True) for way in ("ddp", "sharded"))
    assert many["adamw"] == one["adamw"] and many["frozen"] == one["frozen"] / 64


def test_cards():
    assert cards("8xH100") == (8, CARDS["h100"])
    for wrong in ("8xH10", "0xh100", "h100x8x"):
        with pytest.raises(LinearizeError, match="--gpus"):
            cards(wrong)


def test_constants_of_others():
    assert ELEMENTS["cuda"] == memory.SLICE
    assert (
        SHAPES["smollm2-135m"]["num_attention_heads"] * SHAPES["smollm2-135m"]["head_dim"] == memory.KEPT_AT
    )


def test_a_misspelt_shape_is_told_its_neighbour(monkeypatch):
    def unknown(model):
        raise CheckpointError(f"no model '{model}'")

    monkeypatch.setattr("linearize.models.load_config", unknown)
    assert config_of("Llama-3-8B").num_hidden_layers == 32
    with pytest.raises(CheckpointError, match=r"no model 'llama-3-9b'.*did you mean 'llama-3-8b'"):
        config_of("llama-3-9b")


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "phi3"])
def test_families_have_a_plan(name):
    found = plan(family_config(name), compose("lolcats"), 1, CARDS["h100"], model=name, name="lolcats")
    inner = {"gpt2": 128}.get(name, 48)
    assert [stage.sizes.inner for stage in found.stages] == [inner] * 2
    assert all(stage.fit.way == "one card" for stage in found.stages)


def test_widths_that_have_another_name():
    for config, inner in (
        (transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_inner=80), 80),
        (transformers.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4), 128),
        (transformers.OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=72), 72),
    ):
        found = plan(config, compose("lolcats"), 1, CARDS["h100"], model="one", name="lolcats")
        assert {stage.sizes.inner for stage in found.stages} == {inner}


def test_layers_of_unequal_heads_have_a_plan():
    """transformers refuses to read a width off such a config, which `plan` and the CUDA graph's step both asked for."""
    config = odd.config("gemma4_text", num_kv_shared_layers=0, global_head_dim=24)
    assert head_sizes(config) == {8, 24} and most(config, "head_dim") == 24
    assert head_sizes(family_config("gpt2")) == {8} and most(family_config("gpt2"), "head_dim") is None
    found = plan(config, compose("hedgehog"), 1, CARDS["h100"], model="one", name="hedgehog")
    assert {stage.sizes.query for stage in found.stages} == {4 * 24}
    assert not fits(odd.model("gemma4_text", num_kv_shared_layers=0, global_head_dim=24), config)


@pytest.mark.parametrize(
    "shape, total, active", [("mixtral-8x7b", 46.7e9, 12.9e9), ("qwen3-30b-a3b", 30.5e9, 3.3e9)]
)
def test_experts_count_as_far_as_they_work(shape, total, active):
    """Totals and active parameters are those that the papers give; memory is of all, work of some."""
    found = plan(config_of(shape), compose("lolcats"), 8, CARDS["h100"], model=shape, name="lolcats")
    assert found.teacher == pytest.approx(total, rel=0.005)
    assert found.active == pytest.approx(active, rel=0.02)
    transfer, lora = found.stages
    # of the last layer only what stands in front of its output projection runs
    body = 2 * (found.active - 2 * transfer.sizes.head) * (1 - 1 / config_of(shape).num_hidden_layers)
    assert body < transfer.flops < 1.12 * body  # softmax and mixers come on top
    assert transfer.fit.bytes["frozen"] * transfer.fit.cards ** (transfer.fit.way == "sharded") > 1.9 * total
    assert "a mixture of experts" in lora.basis
    assert lora.sizes.inner == {"mixtral-8x7b": 2 * 14_336, "qwen3-30b-a3b": 8 * 768}[shape]


def test_experts_that_do_not_say_how_many_work(monkeypatch):
    config = family_config("qwen3_moe")
    monkeypatch.setattr("linearize.models.experts.CHOSEN", ("experts_at_work", "chosen"))
    with pytest.raises(UnsupportedModelError, match="does not say in its config how many"):
        plan(config, compose("lolcats"), 1, CARDS["h100"], model="one", name="lolcats")


def test_blocks_of_every_size():
    recipe = compose("lolcats", ["stages.transfer.clip_by=layer"])
    count, card = cards("4xh100")
    found = blocks.plan(config_of("llama-3-70b"), recipe, count, card, name="lolcats")
    # whole steps of 8 x 1,024 tokens in 20 M, 8192 numbers of two bytes each
    assert found.stream == {"transfer": 20_000_000 // 8192 * 8192 * 8192 * 2}
    assert [row.blocks for row in found.rows] == [80, 40, 20, 16, 10, 8, 5, 4, 1]
    whole = plan(config_of("llama-3-70b"), recipe, 8, card, model="llama-3-70b", name="lolcats").stages[0]
    for row in found.rows:
        assert row.disk == row.blocks * found.stream["transfer"]
        assert row.least == min(2, row.blocks) * found.stream["transfer"]
        # a card holds its layers and little else
        own = 2 * row.layers * (found.teacher - 2 * 128_256 * 8192) / 80
        assert own < row.train < 1.2 * own + 4 * 2**30 and own < row.write < 1.2 * own + 4 * 2**30
        # all blocks one after the other are the whole stage on as many cards, at full efficiency
        if row.layers <= 20:
            hours = row.block_hours * row.blocks / 8 / speed.SCALING
            assert hours == pytest.approx(whole.hours, rel=0.1)
    assert found.rows[0].hours == pytest.approx(20 * found.rows[0].block_hours)
    assert found.cells()[-1]["hours, a block"] == "does not fit"


def test_blocks_of_experts_are_not_planned():
    count, card = cards("8xH100")
    recipe = compose("lolcats", ["stages.transfer.clip_by=layer"])
    with pytest.raises(LinearizeError, match="mixtral: a mixture of experts"):
        blocks.plan(config_of("mixtral-8x7b"), recipe, count, card, name="lolcats")


def test_blocks_are_planned_on_the_command_line(capsys):
    assert cli.main(["blocks", "plan", "llama-3-8b", "lolcats", "stages.transfer.clip_by=layer"]) == 0
    out = capsys.readouterr().out
    assert "one stream  transfer 163.8 GB" in out and "on 1 card," in out
    assert cli.main(["blocks", "plan", "llama-3-8b", "lolcats"]) == 2
    assert "stages.transfer.clip_by=layer" in capsys.readouterr().err
    assert cli.main(["blocks", "writ", "llama-3-8b", "lolcats"]) == 2
    assert "did you mean 'write'" in capsys.readouterr().err
