"""Whatever stands in a checkpoint's files, loading it succeeds or says what is wrong: no traceback, no hanging.

A valid tiny checkpoint is changed in one to three places: values of its JSON files, of the weight index, of the plan
that an export holds, or plain bytes. `pytest -m slow` tries 2,000 of them, and `LINEARIZE_FUZZ=n` n.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import byte_llama
import pytest
import tiny
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import linearize
from linearize import export, surgery
from linearize.errors import LinearizeError
from linearize.models import load_config, load_teacher, load_tokenizer, render_chat, resolve

SECONDS = 20.0
"""That loading a few thousand parameters may take on a busy machine; a hang takes longer by far."""
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
INDEX = "model.safetensors.index.json"

ODD = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            0,
            1,
            -1,
            2,
            3,
            7,
            96,
            10**6,
            10**9,
            2**63,
            10**30,
            0.0,
            -0.5,
            1e308,
            float("nan"),
        ]
    ),
    st.sampled_from(
        [
            "",
            "x",
            "\0",
            "🙂",
            "../x",
            "/etc/passwd",
            "..\\x",
            "llama",
            "linearized_x",
            "default",
            "full",
            "half",
        ]
    ),
    st.sampled_from([[], {}, [None], ["x"], {"x": 1}, {"name": "none"}, {"rope_type": "yarn", "factor": 0}]),
    st.floats(),
    st.integers(-(10**4), 10**4),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
)
NAMES = """
num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_size vocab_size intermediate_size
rope_parameters rope_scaling rope_theta max_position_embeddings sliding_window layer_types attention_bias mlp_bias
tie_word_embeddings dtype torch_dtype quantization_config auto_map _attn_implementation attn_implementation
architectures text_config num_labels id2label model_type hidden_act rms_norm_eps pad_token_id is_encoder_decoder
is_decoder to_dict sub_configs chat_template tokenizer_class added_tokens eos_token pad_token extra_special_tokens
model_max_length normalizer pre_tokenizer decoder post_processor truncation padding model version num_beams
temperature eos_token_id transformers_weights weight_map
"""
KEYS = st.sampled_from(NAMES.split())


def changed(draw: st.DrawFn, content: Any) -> Any:
    """JSON with one value replaced, taken out or added, at a place that hypothesis draws."""
    if not isinstance(content, (dict, list)) or not content or draw(st.integers(0, 19)) == 0:
        return draw(ODD)
    if isinstance(content, list):
        place: Any = draw(st.integers(0, min(len(content), 50) - 1))
    else:
        place = draw(st.sampled_from(sorted(content)))
    action = draw(st.sampled_from(["deeper", "deeper", "deeper", "replace", "remove", "add"]))
    made = content.copy()
    if action == "remove":
        del made[place]
    elif action == "add" and isinstance(made, dict):
        made[draw(KEYS | st.sampled_from(sorted(content)))] = draw(ODD)
    elif action == "deeper":
        made[place] = changed(draw, content[place])
    else:
        made[place] = draw(ODD)
    return made


def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes cut short, or with some of the first few hundred replaced: headers are where the meaning is."""
    if draw(st.booleans()):
        return content[: draw(st.integers(0, len(content)))]
    start = draw(st.integers(0, min(len(content), 600)))
    return (
        content[:start]
        + draw(st.binary(min_size=1, max_size=12))
        + content[start + draw(st.integers(0, 12)) :]
    )


@st.composite
def damage(draw: st.DrawFn, sources: dict[str, Path]) -> tuple[str, dict[str, bytes]]:
    """A source, and new content for some of its files."""
    source = draw(st.sampled_from(sorted(sources)))
    folder, made = sources[source], {}
    names = [name for name in (*JSON_FILES, INDEX) if (folder / name).is_file()]
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(["plan", "config.json", *names, "bytes"]))
        if name == "bytes":
            name = draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
            made[name] = damaged(draw, made.get(name, (folder / name).read_bytes()))
            continue
        file = "config.json" if name == "plan" else name
        try:
            content = json.loads(made.get(file, (folder / file).read_bytes()))
        except ValueError:
            continue  # damaged already
        if name == "plan" and isinstance(content, dict) and "linearize" in content:
            content["linearize"] = changed(draw, content["linearize"])
        else:
            content = changed(draw, content)
        made[file] = json.dumps(content).encode()
    return source, made


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Valid checkpoints: one file, in shards, converted."""
    root = tmp_path_factory.mktemp("valid")
    teacher = tiny.model("llama", num_hidden_layers=2, vocab_size=300)
    tokenizer = byte_llama.byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
    for name, size in (("whole", "1GB"), ("shards", "20KB")):
        teacher.save_pretrained(root / name, max_shard_size=size)
        tokenizer.save_pretrained(root / name)
    converted = surgery.convert(teacher, tiny.LAWCAT)
    linearize.save(converted, root / "converted", tokenizer=tokenizer, recipe={"mixer": tiny.LAWCAT})
    return {path.name: path for path in root.iterdir()}


def load_all(folder: Path, kind: str) -> list[str]:
    """Every loader on the folder; what each of them said."""
    loaders = [load_config, load_teacher, load_tokenizer, resolve]
    said = []
    for loader in [*loaders, export.load] if kind == "converted" else loaders:
        try:
            made = loader(str(folder))
            if loader is load_tokenizer and made.chat_template:
                render_chat(made, [{"role": "user", "content": "hello"}])
        except LinearizeError as error:
            said.append(str(error))
    return said


def check(sources: dict[str, Path], case: tuple[str, dict[str, bytes]], folder: Path) -> None:
    source, files = case
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sources[source], folder)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    started = time.process_time()
    said = load_all(folder, source)
    assert time.process_time() - started < SECONDS
    for message in said:
        assert "trust_remote_code=True" not in message and len(message) < 2000, message


def run(sources: dict[str, Path], folder: Path, examples: int) -> None:
    @settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(damage(sources))
    def damaged_checkpoints_are_refused_by_name(case: tuple[str, dict[str, bytes]]) -> None:
        check(sources, case, folder)

    damaged_checkpoints_are_refused_by_name()


def test_the_valid_ones_load(sources, tmp_path):
    for name, source in sources.items():
        assert load_all(source, name) == []


def test_no_traceback(sources, tmp_path):
    run(sources, tmp_path / "case", int(os.environ.get("LINEARIZE_FUZZ", "100")))


@pytest.mark.slow
def test_no_traceback_in_two_thousand(sources, tmp_path):
    run(sources, tmp_path / "case", 2000)
