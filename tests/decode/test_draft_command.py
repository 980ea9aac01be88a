"""`linearize generate --draft`: the same text as without, what is said at the end, and what is refused by name."""

from __future__ import annotations

import byte_llama
import pytest
import tiny
import torch

import linearize
from linearize import cli, export, surgery
from linearize.decode import Draft, choice
from linearize.errors import LinearizeError

TEXT, MORE = byte_llama.TEXT[:150], " In the year 17"
NEW = ["--max-new-tokens", "12"]


def student(seed: int = 0, layers="all"):
    torch.manual_seed(1)
    return surgery.convert(byte_llama.tiny_llama(seed=seed), byte_llama.MIXER, layers)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A softmax model and two conversions of it."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = byte_llama.byte_tokenizer()
    byte_llama.tiny_llama().save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    for name, layers in (("student", "all"), ("hybrid", [1])):
        export.save(student(layers=layers), folder / name, tokenizer=tokenizer)
    return folder


def said(capsys, *line: object) -> tuple[str, str]:
    assert cli.main(["generate", *map(str, line)]) == 0
    return capsys.readouterr()


@pytest.mark.parametrize(
    ("path", "draft"), [("teacher", "student"), ("student", "hybrid"), ("hybrid", "teacher")]
)
def test_the_text_is_the_one_without_a_draft(folders, path, draft, capsys):
    line = [folders / path, "--prompt", TEXT, *NEW]
    whole, _ = said(capsys, *line)
    for more in ([], ["--draft-tokens", 2], ["--draft-tokens", 40], ["--no-graph"]):
        out, err = said(capsys, *line, "--draft", folders / draft, *more)
        assert out == whole
        assert "drafted tokens taken (" in err and "tokens a round" in err and "tokens/s" in err


def test_from_states_of_one_text(folders, tmp_path, capsys):
    """The model's state alone, and with what the draft has read of the same text; not of another."""
    path = tmp_path / "doc.txt"
    for name, text in (("other", TEXT[:-1]), ("doc", TEXT)):
        path.write_text(text, encoding="utf-8")
        for model in ("student", "hybrid"):
            said(capsys, folders / model, "--prompt-file", path, "--save-state", tmp_path / f"{name}-{model}")
    line = [folders / "student", "--state", tmp_path / "doc-student", "--prompt", MORE, *NEW]
    alone, _ = said(capsys, *line)
    line += ["--draft", folders / "hybrid"]
    assert said(capsys, *line)[0] == alone
    assert said(capsys, *line, "--draft-state", tmp_path / "doc-hybrid")[0] == alone
    for state, why in (("other-hybrid", "of another text"), ("doc-student", "another model's")):
        assert cli.main(["generate", *map(str, line), "--draft-state", str(tmp_path / state)]) == 2
        shown = capsys.readouterr()
        assert why in shown.err and shown.out == ""


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--draft-tokens", "3"], "--draft-tokens without --draft"),
        (["--draft-state", "x"], "--draft-state without --draft"),
        (["--draft", "student", "--draft-state", "x"], "--draft-state without --state"),
        (["--draft", "student", "--save-state", "x"], "--save-state with --draft"),
        (["--draft", "student", "--num-beams", "2"], "--num-beams with --draft"),
        (["--draft", "student", "--compile", "--no-graph"], "--compile: it is the graph that is compiled"),
        (["--draft", "student", "--draft-tokens", "65"], "a draft of 65 tokens"),
        (["--draft", "student", "--device", "cuda"], "torch sees no CUDA device"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_options_that_mean_nothing(folders, options, why, capsys, monkeypatch):
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.chdir(folders)
    assert cli.main(["generate", "teacher", "--prompt", "a", *options]) == 2
    shown = capsys.readouterr()
    assert why in shown.err and shown.out == "" and "Traceback" not in shown.err


@pytest.mark.parametrize(
    "options",
    [["--draft", "student", "--draft-tokens", "65"], ["--draft", "nothing"], ["--draft", "student", "--state", "x"],
     ["--draft", "student", "--state", "state", "--draft-state", "x"]],
    ids=" ".join,
)  # fmt: skip
def test_a_draft_is_looked_at_before_the_model_is_loaded(folders, options, capsys, monkeypatch):
    monkeypatch.chdir(folders)
    said(capsys, "teacher", "--prompt", "a", "--save-state", "state")
    monkeypatch.setattr("linearize.cli.checkpoint.load", lambda *_: pytest.fail("a model was loaded"))
    assert cli.main(["generate", "teacher", "--prompt", "a", *options]) == 2


def test_a_draft_with_other_tokens_is_refused(folders, tmp_path, capsys):
    tokenizer = byte_llama.byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    model = byte_llama.tiny_llama()
    model.resize_token_embeddings(260)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    line = ["generate", str(folders / "teacher"), "--prompt", "a", "--draft", str(tmp_path / "other")]
    assert cli.main(line) == 2
    shown = capsys.readouterr()
    assert (
        "another tokenizer: 1 tokens differ ('<more>' is none for the model and 259 for the draft)"
        in shown.err
    )
    assert shown.out == ""


def test_rows_and_pieces_of_text():
    model, tokenizer = student(), byte_llama.byte_tokenizer()
    draft = Draft(student(layers=[1]), tokenizer, tokens=3)
    prompts = [TEXT[:30], TEXT[:11], TEXT[5:50]]
    options = {"max_new_tokens": 12}
    assert linearize.generate(model, tokenizer, prompts, draft=draft, **options) == linearize.generate(
        model, tokenizer, prompts, **options
    )
    pieces: list[str] = []
    whole = linearize.generate(model, tokenizer, TEXT, draft=draft, on_text=pieces.append, **options)
    assert whole == linearize.generate(model, tokenizer, TEXT, **options) and "".join(pieces) == whole[0]
    assert draft.count.tokens > draft.count.rounds > 0 and draft.count.seconds > 0


def test_what_cannot_draft_is_named(monkeypatch):
    model, tokenizer = student(), byte_llama.byte_tokenizer()

    def refused(why, draft, tokenizer=tokenizer, model=model, **options):
        with pytest.raises(LinearizeError, match=why):
            linearize.generate(model, tokenizer, "abc", draft=draft, max_new_tokens=5, **options)

    fine = Draft(student(), tokenizer)
    refused("beam search.*: a draft serves", fine, num_beams=2)
    refused("option repetition_penalty", fine, repetition_penalty=1.2)
    refused("compile=True: the model is on cpu", fine, compile=True)
    refused("graph=True: the model is on cpu", fine, graph=True)
    refused(
        "the draft cannot be decoded ahead of a text: a Linear is not",
        Draft(torch.nn.Linear(2, 2), tokenizer),
    )
    with surgery.mode(model, "teacher"):
        refused("the model cannot be decoded ahead.*run as their teacher", fine)
    refused("the draft has 97 tokens and the model 259; give both tokenizers", Draft(tiny.model()))
    short = tiny.model("gpt2", n_positions=6, vocab_size=259)
    refused("8 tokens are more than the draft's 6 learned positions", Draft(short, tokenizer))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    changing = tiny.model(vocab_size=259, max_position_embeddings=6, rope_parameters=rope)
    refused("RoPE 'dynamic'.*or generate without a draft", fine, model=changing)
    for tokens in (0, 2.5, True, 65):
        with pytest.raises(LinearizeError, match="whole number from 1 to 64"):
            Draft(model, tokens=tokens)
    state = linearize.read_state(model, tokenizer, TEXT)
    refused("the draft goes on from a state and the model does not", Draft(student(), tokenizer, state=state))
    monkeypatch.setattr(choice, "DEVICE", "cpu")
    assert linearize.generate(model, tokenizer, "abc", draft=fine, max_new_tokens=5, graph=True)
