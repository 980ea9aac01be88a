"""A conversion of a folder whose name could be a repository's: found from elsewhere, never looked for on the hub."""

from __future__ import annotations

import json
import shutil

import byte_llama
import pytest

from linearize import cli, export, surgery
from linearize.export.origin import origin, recorded
from linearize.export.push import gather
from linearize.models import hub

SUITE = "about: small\nmeasure:\n  - {task: text, length: 48, windows: 1, roles: [student, teacher]}\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder in which `models/mine` was converted to `out`; the hub must not be asked."""

    def asked(model, *rest):
        raise AssertionError(f"the hub was asked for {model}")

    monkeypatch.setattr(hub, "fetch", asked)
    place = tmp_path / "here"
    byte_llama.tiny_llama().save_pretrained(place / "models/mine")
    byte_llama.byte_tokenizer().save_pretrained(place / "models/mine")
    monkeypatch.chdir(place)
    model = surgery.convert(byte_llama.tiny_llama(), byte_llama.MIXER)
    export.save(model, "out", tokenizer=byte_llama.byte_tokenizer(), base="models/mine")
    (place / "small.yaml").write_text(SUITE)
    return place


def judge(place, capsys):
    line = ["eval", str(place / "out"), "--suite", str(place / "small.yaml"), "--out", str(place / "scores")]
    code = cli.main(line)
    return code, capsys.readouterr()


def test_the_teacher_is_found_from_another_folder(here, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, said = judge(here, capsys)
    assert code == 0 and "mine (teacher)" in said.out


def test_a_teacher_that_moved_along_is_found_and_one_that_is_gone_is_not_looked_for(
    here, tmp_path, monkeypatch, capsys
):
    there = tmp_path / "there"
    here.rename(there)
    monkeypatch.chdir(there)
    assert judge(there, capsys)[0] == 0
    shutil.rmtree(there / "models")
    shutil.rmtree(there / "scores")
    code, said = judge(there, capsys)
    assert code == 2 and "converted from a model that is not here" in said.err and "--against" in said.err


def test_what_is_published_names_no_path_and_nobody_elses_model(here, tmp_path, monkeypatch):
    note = json.loads((here / "out" / "linearize.json").read_text())
    assert note["base"] == "models/mine" and note["base_path"] == str(here / "models" / "mine")
    monkeypatch.chdir(tmp_path)
    gathered = gather(here / "out", "me/small", license="mit")
    sent = json.loads(gathered.made["linearize.json"])
    assert sent["base"] == "" and "base_path" not in sent and sent["recipe"] == note["recipe"]
    assert "base_model:" not in gathered.card and str(here) not in gathered.card
    assert "linearize.json" not in gathered.files and "linearize.json" not in gathered.left_out
    named = gather(here / "out", "me/small", license="mit", base_model="owner/base")
    assert json.loads(named.made["linearize.json"])["base"] == "owner/base"


def test_only_what_is_here_has_a_path(here):
    assert origin("smollm2-135m") == {"base": "smollm2-135m"} and origin("") == {"base": ""}
    assert origin("owner/base") == {"base": "owner/base"}
    assert recorded({"base": 3, "base_path": "/a"}) == recorded({}) == {}
