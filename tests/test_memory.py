"""What does not fit is refused before it is made: an allocator that hands out more than there is says nothing."""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from decoding import HEDGEHOG, LOLCATS, MIXERS, devices, hybrid

from linearize import memory
from linearize.decode import Decoder
from linearize.decode.cache import tensors
from linearize.decode.draft import Draft, speculate_ids
from linearize.decode.prompts import Prompts
from linearize.decode.reader import BESIDE
from linearize.decode.row_cache import RowCache
from linearize.decode.slots import Slots
from linearize.decode.speculator import Speculator
from linearize.errors import LinearizeError

FULL = MIXERS["nope"]
CPU = torch.device("cpu")


@pytest.fixture
def only(monkeypatch):
    """Says that so many bytes are free."""

    def say(count: int) -> None:
        for module in ("linearize.memory", "linearize.decode.slots"):
            monkeypatch.setattr(f"{module}.free", lambda device: count)

    return say


def everywhere(layers, mixer=LOLCATS, device="cpu", **changes):
    return hybrid("llama", layers, mixer, device, num_hidden_layers=2, **changes)


@devices
@pytest.mark.parametrize("layers", ["all", [1], []], ids=["all", "hybrid", "teacher"])
def test_more_slots_than_there_is_memory_for(layers, device, only):
    """As many as the refusal names are made, and one more is refused."""
    model = everywhere(layers, device=device) if layers else tiny.model("llama").to(device)
    only(3 * 2**20)
    with pytest.raises(LinearizeError, match=r"65,536 slots need more memory.*MiB are free") as refused:
        Slots(model, 65536, 300, prompts=2).prepare()
    most = int(re.search(r"take at most ([\d,]+)", str(refused.value))[1].replace(",", ""))
    assert most > 2
    slots = Slots(model, most, 300, prompts=2, capture=False)
    slots.prepare()
    held = slots.bytes + slots._reading._held.bytes
    assert held == (most + 2) * slots._rows.row().bytes, "a row is what was told of it"
    assert held < 3 * 2**20
    with pytest.raises(LinearizeError, match=rf"at most {most:,}(,|$)"):
        Slots(model, most + 1, 300, prompts=2).prepare()


@pytest.mark.parametrize("mixer", [LOLCATS, FULL], ids=["lolcats", "full"])
@pytest.mark.parametrize("length", [1, 63, 64, 200, 1000])
def test_a_row_is_known_before_it_is_made(length, mixer):
    """Of softmax layers, kept or run by a mixer, the places are as many as the length asks for."""
    slots = Slots(everywhere([1], mixer), 2, length)
    row = slots._rows.row()
    made = slots._rows._read(slots._rows.held)
    assert {name: (x.shape, x.dtype) for name, x in row.held.items()} == {
        name: (x.shape, x.dtype) for name, x in tensors(made).items()
    }


@pytest.mark.parametrize("rows", [3, 10**13])
@pytest.mark.parametrize("mixer", [LOLCATS, FULL], ids=["lolcats", "full"])
def test_whatever_the_length_nothing_is_made_first(mixer, rows, monkeypatch):
    """By what this machine really has: a length, or a number of slots, that no machine has the memory for."""
    if memory.free(CPU) is None:
        pytest.skip("this system does not tell what is free")
    made: list[int] = []
    for kind in (RowCache, Prompts):
        monkeypatch.setattr(kind, "__init__", lambda self, *args, **kwargs: made.append(1))
    with pytest.raises(
        LinearizeError, match=rf"{rows:,} slots need more memory.* are free; (not one fits|take at most)"
    ):
        Slots(everywhere([1], mixer), rows, 10**12).prepare()
    assert not made


@pytest.mark.parametrize("mixer", [LOLCATS, FULL], ids=["lolcats", "full"])
@pytest.mark.parametrize(("batch", "length"), [(2, 10**12), (10**8, 4096)])
def test_decoders_of_texts_that_do_not_fit(mixer, batch, length, monkeypatch):
    """Before their buffers, and before what is as long as the texts: by what this machine really has."""
    if memory.free(CPU) is None:
        pytest.skip("this system does not tell what is free")
    model = everywhere([1], mixer)
    asked: list[int] = []
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, **given: asked.append(1) or ones(*size, **given))
    for make in (
        lambda: Decoder(model, batch, length=length),
        lambda: Speculator(model, model, batch, 2, length=length),
    ):
        with pytest.raises(
            LinearizeError, match=r"texts of [\d,]+ tokens need more memory.*free; take fewer"
        ):
            make().prepare()
    assert not asked


def test_states_without_softmax_layers_are_counted_too(only):
    only(2**20)
    model = everywhere("all")
    Decoder(model, 4).prepare()
    with pytest.raises(LinearizeError, match=r"10,000 texts need more memory.*1 MiB are free"):
        Decoder(model, 10_000).prepare()


def test_what_a_decoder_holds_is_what_was_counted():
    for layers, mixer in (("all", HEDGEHOG), ([1], LOLCATS), ([1], FULL)):
        decoder = Decoder(everywhere(layers, mixer), 3, length=200)
        decoder.prepare()
        held = sum(x.numel() * x.element_size() for x in tensors(decoder.cache).values())
        assert decoder.room.taken == held + 11 * decoder.length + 3 * BESIDE


def test_a_draft_and_its_model_share_what_is_free(only):
    """Each would fit alone."""
    model, draft = everywhere([1]), everywhere([0])
    ids = torch.tensor([[3, 4, 5]])
    made = Speculator(model, draft, 1, 2, length=400, tokens=4)
    made.prepare()
    both = made.model.room.taken
    only(both)
    speculate_ids(model, ids, None, {"max_new_tokens": 4, "do_sample": False}, Draft(draft))
    only(both * 2 // 3)
    with pytest.raises(LinearizeError, match="need more memory than there is"):
        Speculator(model, draft, 1, 2, length=400, tokens=4).prepare()


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


@pytest.mark.parametrize(
    ("line", "mount", "names"), [("0::{}", "", V2), ("4:memory:{}", "memory", V1)], ids=["v2", "v1"]
)
@pytest.mark.parametrize("inside", [True, False], ids=["own name", "name of outside"])
def test_a_container_has_what_it_may_use(tmp_path, monkeypatch, line, mount, names, inside):
    meminfo, own, groups = tmp_path / "meminfo", tmp_path / "cgroup", tmp_path / "groups"
    meminfo.write_text("MemTotal:       1000000 kB\nMemAvailable:    500000 kB\n")
    own.write_text("12:cpuset:/\n" + line.format("/pod/own") + "\n")
    for name, path in {"MEMINFO": meminfo, "OWN_GROUPS": own, "GROUPS": groups}.items():
        monkeypatch.setattr(memory, name, path)
    assert memory.machine() == (512_000_000, 1_024_000_000)
    folder = groups / mount / ("pod" if inside else "")
    folder.mkdir(parents=True)
    limit, used, cached = names
    (folder / "memory.stat").write_text(f"anon 5\n{cached} 20000000\n")
    (folder / used).write_text("120000000\n")
    (folder / limit).write_text("300000000\n")
    assert memory.machine() == (200_000_000, 300_000_000)
    (folder / limit).write_text("max\n" if names is V2 else f"{2**63 - 4096}\n")
    assert memory.machine() == (512_000_000, 1_024_000_000)
    (folder / limit).write_text("50000000\n")
    assert memory.machine()[0] == 0


def test_a_system_that_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    assert memory.machine() == (0, 0)
    assert memory.free(CPU) is None
    memory.Room(CPU, "texts", "").take(2**62)
