"""What goes to the hub, what its card says, and what is said where it cannot go; a local server stands in for it."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import byte_llama
import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import LocalTokenNotFoundError

from linearize import cli, export, surgery
from linearize.export.push import gather

TABLE = "| model | perplexity |\n| --- | ---: |\n| demo | 26.81 |"
PAGE = f"# demo\n\n**demo is better.**\n\n## Summary\n\n{TABLE}\n\n## Quality\n\nmore\n"
RECIPE = {"description": "A window and a map", "stages": {"transfer": {"tokens": 100, "lr": 0.01}}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder: an export in several weight files, and the page that eval wrote."""
    folder = tmp_path_factory.mktemp("made") / "run"
    model = surgery.convert(byte_llama.tiny_llama(), byte_llama.MIXER, "all")
    where = folder / "checkpoint"
    tokenizer = byte_llama.byte_tokenizer()
    export.save(model, where, tokenizer=tokenizer, base="smollm2-135m", recipe=RECIPE, max_shard_size="20KB")
    (where / "notes.bin").write_bytes(b"no part of the model")
    (folder / "recipe.yaml").write_text("description: x\n")
    (folder / "eval").mkdir()
    (folder / "eval" / "page.md").write_text(PAGE)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """The client at its boundary: what it was asked to make and to send."""
    asked = {}

    def create_repo(self, repo, **options):
        asked["repo"], asked["options"] = repo, options

    def upload_folder(self, *, repo_id, folder_path, **options):
        asked["sent"] = {
            str(path.relative_to(folder_path)): path.read_bytes()
            for path in folder_path.rglob("*")
            if path.is_file()
        }

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    return asked


def test_what_goes(run, hub, capsys):
    assert cli.main(["push", str(run), "me/small", "--private"]) == 0
    assert "https://huggingface.co/me/small" in capsys.readouterr().out
    assert hub["repo"] == "me/small" and hub["options"] == {"private": True, "exist_ok": True}
    sent = hub["sent"]
    index = json.loads(sent["model.safetensors.index.json"])
    assert set(index["weight_map"].values()) == {name for name in sent if name.endswith(".safetensors")}
    assert len(set(index["weight_map"].values())) > 1
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "modeling_linearized.py",
        "linearize.json",
    ):
        assert sent[name] == (run / "checkpoint" / name).read_bytes(), name
    assert "notes.bin" not in sent
    _, front, body = sent["README.md"].decode().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["linearize", "linear-attention"],
        "license": "apache-2.0",
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune",
    }
    assert 'from_pretrained("me/small")' in body and "PATH" not in body
    assert (
        "(https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), under its licence, apache-2.0" in body
    )
    assert (
        "**demo is better.**" in body
        and "| demo | 26.81 |" in body
        and "more" not in body.split("## Recipe")[0]
    )
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0]) == RECIPE


def test_a_dry_run_shows_it_and_calls_nobody(run, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.HfApi, "__init__", None)
    monkeypatch.setattr("socket.socket", None)
    assert cli.main(["push", str(run), "me/small", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "left out  notes.bin" in said and "KiB  modeling_linearized.py" in said
    assert "license: apache-2.0" in said


def test_a_licence_that_nobody_knows(run, hub, tmp_path, capsys):
    model = surgery.convert(byte_llama.tiny_llama(), byte_llama.MIXER, "all")
    folder = export.save(model, tmp_path / "made", tokenizer=byte_llama.byte_tokenizer(), base="owner/base")
    (folder / "generation_config.json").unlink()
    said = []
    for dry in (["--dry-run"], []):
        assert cli.main(["push", str(folder), "me/small", *dry]) == 2
        said.append(capsys.readouterr())
    assert said[0].err == said[1].err and "cannot go: no licence is known" in said[0].err
    assert "give --license NAME" in said[0].err and not hub
    # what would go is shown all the same
    assert "generation_config.json" in said[0].out and "base_model: owner/base" in said[0].out
    assert cli.main(["push", str(folder), "me/small", "--license", "mit", "--dry-run"]) == 0
    assert cli.main(["push", str(folder), "me/small", "--license", "mit"]) == 0
    card = hub["sent"]["README.md"].decode()
    assert "license: mit" in card and "base_model: owner/base" in card
    assert json.loads(hub["sent"]["generation_config.json"])["eos_token_id"] == 257
    made = gather(folder, "me/small", license="mit", base_model="a/b")
    assert "base_model: a/b" in made.card and made.sizes()["README.md"] == len(made.card.encode())


@pytest.mark.parametrize(
    ("repo", "said"),
    [
        ("small", "the owner is missing"),
        ("a/b/c", "names no repository"),
        ("me/sm all", "names no repository"),
        ("me/x--y", "names no repository"),
    ],
)
def test_names_that_are_none(run, capsys, repo, said):
    assert cli.main(["push", str(run), repo, "--dry-run"]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "write owner/model" in error and "Traceback" not in error


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_does_not_load(run, tmp_path, capsys, name):
    shutil.copytree(run / "checkpoint", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / name).write_text("[")
    assert cli.main(["push", str(tmp_path / "checkpoint"), "me/small", "--dry-run"]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


@pytest.mark.parametrize("terms", ["", "\n", "two words", "a: b", "MIT\n---"])
def test_a_licence_that_is_no_name(run, capsys, terms):
    assert cli.main(["push", str(run), "me/small", "--dry-run", "--license", terms]) == 2
    assert "must be as the hub writes it" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["eval/page.md", "checkpoint/README.md"])
def test_pages_in_another_encoding(run, tmp_path, capsys, name):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes("# caf\xe9\n".encode("latin-1"))
    assert cli.main(["push", str(tmp_path / "run"), "me/small", "--dry-run"]) == 2
    assert f"{name} is no text in UTF-8 (byte 5)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("tags", "kept"),
    [("", []), ("mine", ["mine"]), ("[mine, 7]", ["mine", "7"]), ("[{a: b}]", ["{'a': 'b'}"])],
)
def test_tags_that_somebody_wrote(run, tmp_path, tags, kept):
    shutil.copytree(run / "checkpoint", tmp_path / "checkpoint")
    card = tmp_path / "checkpoint" / "README.md"
    card.write_text(f"---\ntags: {tags}\n---\n\nwords\n")
    front = yaml.safe_load(gather(tmp_path / "checkpoint", "me/small").card.split("---")[1])
    assert front["tags"] == [*kept, "linearize", "linear-attention"]


def test_what_is_no_conversion(tmp_path, capsys):
    byte_llama.tiny_llama().save_pretrained(tmp_path / "plain")
    assert cli.main(["push", str(tmp_path / "plain"), "me/small", "--dry-run"]) == 2
    assert "is no converted checkpoint" in capsys.readouterr().err


class Refusing(BaseHTTPRequestHandler):
    """A hub that answers everything with one code."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b'{"error": "no"}'
        self.send_response(self.server.code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    ("code", "said"),
    [(401, "`hf auth login`"), (403, "may not write to 'me/small'"), (None, "connect to a network")],
)
def test_a_hub_that_does_not_take_it(run, monkeypatch, capsys, code, said):
    server = HTTPServer(("127.0.0.1", 0), Refusing)
    server.code = code
    address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    if code is None:  # nobody listens
        server.shutdown()
        server.server_close()
    begun = huggingface_hub.HfApi.__init__
    monkeypatch.setattr(
        huggingface_hub.HfApi, "__init__", lambda self: begun(self, endpoint=address, token="hf_none")
    )
    try:
        assert cli.main(["push", str(run), "me/small"]) == 2
    finally:
        server.shutdown() if code else None
        thread.join()
        server.server_close()
    error = capsys.readouterr().err.strip()
    assert said in error and "Traceback" not in error and len(error.splitlines()) == 1


def test_without_a_token(run, monkeypatch, capsys):
    def refused(self, *args, **options):
        raise LocalTokenNotFoundError("Token is required, but no token found.")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refused)
    assert cli.main(["push", str(run), "me/small"]) == 2
    assert "set HF_TOKEN to a token that may write" in capsys.readouterr().err
