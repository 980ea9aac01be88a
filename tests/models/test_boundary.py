"""What a library raises becomes one message; what is a bug of this package stays a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import byte_llama
import jinja2
import pytest
import tiny
import torch
from torch import nn

from linearize.errors import CheckpointError, LinearizeError, UnsupportedModelError
from linearize.eval.generation import generate
from linearize.models import load_teacher, load_tokenizer, render_chat
from linearize.models.boundary import boundary, reason
from linearize.models.tokenizer import check_vocabulary


def raising(error: BaseException, module: str):
    """A function of a module of that name, which raises."""
    names = {"__name__": module, "error": error}
    exec("def function():\n    raise error", names)
    return names["function"]


def inside(*modules: str, error: BaseException):
    """Functions of these modules that call one another, the last of which raises."""
    call = raising(error, modules[-1])
    for module in reversed(modules[:-1]):
        names = {"__name__": module, "call": call}
        exec("def function():\n    call()", names)
        call = names["function"]
    return call


class PanicException(BaseException):
    """As the Rust halves of tokenizers and safetensors raise."""


@pytest.mark.parametrize(
    "error",
    [RuntimeError("no"), KeyError("no"), ZeroDivisionError("no"), AssertionError("no"), PanicException("no")],
    ids=repr,
)
def test_what_a_library_raises_names_file_reason_and_remedy(error):
    message = r"^the file cannot be loaded: .*no.*; fetch it"
    with pytest.raises(CheckpointError, match=message) as caught, boundary("the file", "fetch it"):
        inside("transformers.modeling", "torch.nn", error=error)()
    assert caught.value.__cause__ is error


def test_a_bug_of_ours_stays_a_traceback():
    for modules in (("transformers.x", "linearize.surgery.y"), ("transformers.x", "linearize.y", "torch.z")):
        with pytest.raises(TypeError, match="ours"), boundary("the file", "fetch it"):
            inside(*modules, error=TypeError("ours"))()
    # but the library's own, called back by a class of ours, is the library's
    with pytest.raises(CheckpointError, match="TypeError: theirs"), boundary("the file", "fetch it"):
        inside("transformers.x", "linearize.y", "transformers.z", error=TypeError("theirs"))()


def test_errors_of_the_package_and_interrupts_pass():
    for error in (UnsupportedModelError("ours"), KeyboardInterrupt()):
        with pytest.raises(type(error)), boundary("the file", "fetch it"):
            raise error


def test_too_little_memory_is_said_as_such():
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")):
        with pytest.raises(CheckpointError, match="needs more memory than there is"), boundary("x", "y"):
            inside("transformers.x", error=error)()


def test_reasons_are_one_short_line_without_unsafe_advice():
    text = "contains custom code.\nPlease pass trust_remote_code=True\nThe file has no end\n\nmore"
    assert reason(ValueError(text)) == "The file has no end"
    assert "never run" in reason(ValueError("pass `trust_remote_code=True`"))
    assert len(reason(ValueError("x" * 10_000))) < 400
    assert reason(KeyError("key")) == "KeyError: 'key'"
    assert reason(ValueError("Validation:\n  TypeError: heads is 'x'")) == "heads is 'x'"
    assert "\x1b" not in reason(ValueError("\x1b[31mred"))
    assert reason(AttributeError()) == "AttributeError"


# Tokenizers and their templates.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    byte_llama.tiny_llama().save_pretrained(tmp_path / "model")
    byte_llama.byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "null"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[" * 100_000),
        ("tokenizer.json", "\0"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
        ("tokenizer_config.json", '{"model_max_length": {}, "pad_token": 3}'),
    ],
)
def test_a_damaged_tokenizer_is_named(folder, file, content):
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=r"the tokenizer in .*model cannot be (loaded|read): "):
        load_teacher(str(folder))


def test_a_tokenizer_with_code_of_its_own_is_not_asked_about(folder, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    path = folder / "tokenizer_config.json"
    maps = {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "EvilTokenizer"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **maps}))
    (folder / "evil.py").write_text("raise SystemExit('ran code from the checkpoint')")
    try:
        load_tokenizer(str(folder))
    except CheckpointError as error:
        assert "trust_remote_code" not in str(error)


def test_a_tokenizer_larger_than_the_embedding(folder):
    tokenizer = byte_llama.byte_tokenizer()
    tokenizer.add_tokens(["extra", "further"])
    tokenizer.save_pretrained(folder)
    message = r"has 2 tokens beyond the model's embedding of 259 rows \(first: 'extra', id 259\)"
    with pytest.raises(CheckpointError, match=message):
        load_teacher(str(folder))


def test_a_control_token_beyond_the_embedding_is_refused_where_it_is_used():
    model, tokenizer = byte_llama.tiny_llama(), byte_llama.byte_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    check_vocabulary("here", tokenizer, 259)  # as text models of multimodal families have it
    with pytest.raises(LinearizeError, match=r"the prompt 'see <image>' holds '<image>' \(id 259\)"):
        generate(model, tokenizer, "see <image>", max_new_tokens=1)
    tokenizer.chat_template = "{{ messages[0].content }}<image>"
    with pytest.raises(CheckpointError, match="'<image>', id 259"):
        check_vocabulary("here", tokenizer, 259)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{",
        "{{ messages[7].content.x }}",
        "{% include 'x' %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ range(10**9) | list }}",
        "{{ messages[0].content() }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_fails_is_a_message(template):
    tokenizer = byte_llama.byte_tokenizer()
    tokenizer.chat_template = template
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(
        LinearizeError, match=r"the tokenizer's chat template refuses these messages: .*; mend"
    ):
        render_chat(tokenizer, messages)
    with pytest.raises(LinearizeError, match="the tokenizer's chat template"):
        generate(byte_llama.tiny_llama(), tokenizer, "hello", chat=True, max_new_tokens=1)


def test_the_cause_is_kept_for_those_who_look():
    tokenizer = byte_llama.byte_tokenizer()
    tokenizer.chat_template = "{{"
    with pytest.raises(LinearizeError) as caught:
        render_chat(tokenizer, [{"role": "user", "content": "hello"}])
    assert isinstance(caught.value.__cause__, jinja2.TemplateError)


def test_nan_is_found_in_any_float_format():
    from linearize.models.sound import check_finite

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = nn.Linear(3, 3).to(dtype)
        check_finite("here", model)
        model.bias.data[1] = float("nan")
        with pytest.raises(CheckpointError, match=r"weights of here .* in 1 of 2 tensors \(first: bias\)"):
            check_finite("here", model)
    check_finite("here", tiny.model("llama"))


def test_nan_is_found_in_a_buffer_that_is_stored():
    from linearize.models.sound import check_finite

    model = nn.Linear(3, 3)
    model.register_buffer("mask", torch.full((3,), -torch.inf), persistent=False)
    model.register_buffer("correction", torch.zeros(3))
    check_finite("here", model)
    model.correction[1] = torch.nan
    with pytest.raises(CheckpointError, match=r"in 1 of 3 tensors \(first: correction\)"):
        check_finite("here", model)
