"""The tokenizer of a checkpoint: loaded, held against the model, and its chat template rendered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import CheckpointError, DataError, LinearizeError
from linearize.models.boundary import boundary
from linearize.models.check import has_tokenizer, shorten
from linearize.models.files import check_file, check_files, leads_out, read_json
from linearize.models.resolve import resolve

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG, TEMPLATES = "tokenizer_config.json", "additional_chat_templates"
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the left; where it has no padding token, its end-of-text token pads.

    Args:
        model: a checkpoint folder, or anything that `resolve` takes.

    Raises:
        CheckpointError: the checkpoint holds no tokenizer, one that names files outside of it, or one that cannot be
            read.
    """
    from transformers import AutoTokenizer

    folder = model if isinstance(model, Path) else resolve(model)
    if not has_tokenizer(folder):
        raise CheckpointError(
            f"{folder} holds no tokenizer (no tokenizer.json or vocabulary file), and text cannot be read "
            "or written without one; copy the tokenizer's files into the folder"
        )
    check_names(folder)
    with boundary(f"the tokenizer in {folder}", "fetch the checkpoint again"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        tokenizer.decode(tokenizer("a")["input_ids"])  # some parts are only looked at in use
    return tokenizer


def check_names(folder: Path) -> None:
    """Refuse a tokenizer that would be read from elsewhere, or from what is no file.

    Names are judged, not where links lead. Paths of files that transformers takes from the folder whatever the config
    says stand in many published checkpoints, left from where they were made; only what is there would be read.

    Raises:
        CheckpointError: names the key and the file.
    """
    for place in (folder, folder / TEMPLATES):
        if place.is_dir():
            check_files(place)
    path = folder / CONFIG
    check_file(path, "fetch the checkpoint again")
    try:
        config = read_json(path) if path.exists() else {}
    except CheckpointError:
        return  # the library says what it cannot read of the tokenizer
    again = "mend it, or fetch the checkpoint again"
    versions = config.get("fast_tokenizer_files")
    if versions is not None:
        if not isinstance(versions, list) or not all(isinstance(name, str) for name in versions):
            raise CheckpointError(f"{path}: fast_tokenizer_files must be a list of file names; {again}")
        for name in versions:
            if leads_out(name):
                raise CheckpointError(
                    f"{path}: fast_tokenizer_files names {shorten(name)}, outside the checkpoint's folder; {again}"
                )
        taken = _newest(versions)
        if not (folder / taken).is_file():
            raise CheckpointError(
                f"{path}: of fast_tokenizer_files this version of transformers takes {shorten(taken)}, which the "
                f"folder does not have; {again}"
            )
    for key, name in config.items():
        if key.endswith("_file") and isinstance(name, str) and leads_out(name) and _is_there(folder / name):
            raise CheckpointError(
                f"{path}: {key} is {shorten(name)}, a file outside the checkpoint's folder; take the key out, or fetch "
                "the checkpoint again"
            )


def _newest(versions: list[str]) -> str:
    """The file among those for several versions of transformers that this one takes."""
    from transformers.tokenization_utils_base import get_fast_tokenizer_file

    with boundary("fast_tokenizer_files in tokenizer_config.json", "mend it, or fetch the checkpoint again"):
        return str(get_fast_tokenizer_file(versions))


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def check_vocabulary(where: object, tokenizer: Any, rows: int) -> None:
    """Refuse a tokenizer that makes ids beyond the model's embedding.

    A control token beyond it that text does not make and no template spells is let pass: text models of multimodal
    families keep placeholders of images there.

    Args:
        where: the checkpoint, for the message.
        tokenizer: its tokenizer.
        rows: of the embedding.

    Raises:
        CheckpointError: names the first such token.
    """
    with boundary(f"the tokenizer in {where}", "fetch the checkpoint again", verb="cannot be read"):
        beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
        controls = set(tokenizer.all_special_tokens) if beyond else set()
        for index, added in tokenizer.added_tokens_decoder.items() if beyond else ():
            if index >= rows and added.special:
                controls.add(added.content)
        used = {getattr(tokenizer, role, None) for role in ROLES} if beyond else set()
        template = str(tokenizer.chat_template or "")
    wrong = {
        token: index
        for token, index in beyond.items()
        if token not in controls or token in used or token in template
    }
    if wrong:
        token, index = min(wrong.items(), key=lambda pair: pair[1])
        raise CheckpointError(
            f"{where}: its tokenizer has {len(wrong)} tokens beyond the model's embedding of {rows:,} rows (first: "
            f"{token!r}, id {index:,}); take the tokenizer that belongs to the model, or resize the embedding "
            "(transformers: resize_token_embeddings) and save both"
        )


def check_ids(ids: Sequence[int], rows: int, tokenizer: Any, where: str) -> None:
    """Refuse text whose ids the model's embedding does not have; see `check_vocabulary` for how they come about.

    Args:
        ids: of the text's tokens.
        rows: of the embedding.
        tokenizer: that made the ids, to name the token.
        where: what the text is, for the message.

    Raises:
        LinearizeError: names the token.
    """
    largest = max(ids, default=0)
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise LinearizeError(
            f"{where} holds {token!r} (id {largest:,}), and the model's embedding ends after {rows:,} rows; take "
            "it out of the text"
        )


def render_chat(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """Messages in the tokenizer's chat template, as text.

    Args:
        tokenizer: with a chat template.
        messages: each with role and content.
        **options: for `apply_chat_template` (add_generation_prompt, tools, ...).

    Raises:
        DataError: the template refuses the messages, or is broken.
    """
    remedy = "mend them, or the template"
    with boundary("the tokenizer's chat template", remedy, verb="refuses these messages", kind=DataError):
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
