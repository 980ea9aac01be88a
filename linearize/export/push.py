"""An export on the Hugging Face hub: the files that make a model, and a card that says where it comes from."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from linearize import plain_json
from linearize.config.values import shown
from linearize.errors import CheckpointError, LinearizeError
from linearize.export.load import check_folder
from linearize.export.origin import NOTE, PATH, published, read_note
from linearize.models.aliases import ALIASES
from linearize.models.check import has_tokenizer
from linearize.models.files import read_words
from linearize.models.tokenizer import load_tokenizer

FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "modeling_*.py", "adapter/*")
"""What makes a model; anything else in the folder stays at home."""
CARD = "README.md"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")


@dataclass(frozen=True)
class Gathered:
    """What would go.

    Attributes:
        repo: owner/model.
        folder: of the checkpoint.
        files: paths in it, the card not among them.
        left_out: names of files that stay.
        made: further files, or what takes the place of the folder's own, name -> text.
        card: the README.
        problems: what keeps it from going.
    """

    repo: str
    folder: Path
    files: list[str]
    left_out: list[str]
    made: dict[str, str]
    card: str
    problems: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises LinearizeError with all problems, if there are any."""
        if self.problems:
            raise LinearizeError(f"'{self.repo}' cannot go: {'; '.join(self.problems)}")

    def sizes(self) -> dict[str, int]:
        """Bytes of every file that would go."""
        written = {name: len(text.encode()) for name, text in [*self.made.items(), (CARD, self.card)]}
        return dict(
            sorted({**{name: (self.folder / name).stat().st_size for name in self.files}, **written}.items())
        )


def gather(
    folder: Path,
    repo: str,
    *,
    license: str | None = None,  # noqa: A002 - the hub's name
    base_model: str | None = None,
    judged: str = "",
) -> Gathered:
    """Look at a checkpoint, and make what it lacks; nothing is sent, and no network is needed.

    Args:
        folder: an exported checkpoint.
        repo: owner/model on the hub.
        license: as the hub writes it; None takes the base model's where it is known.
        base_model: hub id; None takes what `linearize.json` says, if that is one.
        judged: markdown of what was measured.

    Raises:
        LinearizeError: no name of a repository.
        CheckpointError: no converted checkpoint, or a damaged one.
    """
    _check_name(repo, "REPO")
    if base_model is not None:
        _check_name(base_model, "--base-model")
    if license is not None and LICENSE.fullmatch(license) is None:
        raise LinearizeError(
            f"--license {shown(license)}: must be as the hub writes it, such as apache-2.0 or other"
        )
    _, config = check_folder(folder)
    if not isinstance(getattr(config, "linearize", None), dict):
        raise CheckpointError(
            f"{folder} is no converted checkpoint; give a folder that `linearize run` or linearize.save wrote"
        )
    if has_tokenizer(folder):
        load_tokenizer(folder)  # what goes is what loads
    note = read_note(folder)
    alias = ALIASES.get(str(note.get("base")))
    base = base_model or (alias.hub if alias else "" if PATH in note else _hub_id(note.get("base")))
    terms = license or (alias.license if alias and base == alias.hub else "")
    held = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = [name for name in held if name != CARD and any(fnmatch(name, pattern) for pattern in FILES)]
    hidden = [name for name in files if any(part.startswith(".") for part in Path(name).parts)]
    files = [name for name in files if name not in hidden]
    made = {} if "generation_config.json" in files else {"generation_config.json": _generation(config)}
    if NOTE in files and PATH in note:
        files.remove(NOTE)
        made[NOTE] = plain_json.dumps(published(note, base), indent=2) + "\n"
    old = read_words(folder / CARD, "convert or delete it") if (folder / CARD).exists() else ""
    problems = []
    if not terms:
        problems.append(
            "no licence is known, and the base model's holds for what is made of it; give --license NAME"
        )
    card = _card(
        old,
        repo,
        base,
        terms,
        note.get("recipe") or {},
        judged,
        bool(getattr(config, "quantization_config", 0)),
    )
    left_out = [name for name in held if name not in files and name not in made and name != CARD]
    return Gathered(repo, folder, files, left_out, made, card, problems)


def push(gathered: Gathered, *, private: bool = False) -> str:
    """Make the repository if it is not there, and put everything into it in one commit; gives its address.

    Raises:
        LinearizeError: a problem of `gather`, no token, no right to write, or no network.
    """
    from huggingface_hub import HfApi

    gathered.check()
    with tempfile.TemporaryDirectory(prefix="linearize-push-") as scratch:
        staged = Path(scratch)
        for name in gathered.files:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            (staged / name).symlink_to((gathered.folder / name).resolve())
        for name, text in {**gathered.made, CARD: gathered.card}.items():
            (staged / name).write_text(text, encoding="utf-8")
        try:
            api = HfApi()
            api.create_repo(gathered.repo, private=private or None, exist_ok=True)
            sent = api.upload_folder(
                repo_id=gathered.repo, folder_path=staged, commit_message="Converted with linearize"
            )
        except Exception as error:
            raise _said(gathered.repo, error) from error
    return str(getattr(sent, "repo_url", None) or f"https://huggingface.co/{gathered.repo}")


def _said(repo: str, error: Exception) -> LinearizeError:
    """One line and the remedy for what the hub's client raises."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    line = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
    code = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or code == 401:
        return LinearizeError(
            f"the hub does not know who is pushing to '{repo}'; log in with `hf auth login`, or set HF_TOKEN to a "
            "token that may write"
        )
    if code in (403, 404):
        return LinearizeError(
            f"the token may not write to '{repo}' ({line}); give a REPO of your own, or a token that may write "
            "(`hf auth login`)"
        )
    if code is not None and isinstance(error, HfHubHTTPError):
        return LinearizeError(f"the hub refused '{repo}' ({line}); mend what it says and push again")
    return LinearizeError(
        f"'{repo}' could not be pushed ({line}); connect to a network and push again; what has arrived is not sent "
        "twice"
    )


def _check_name(repo: str, what: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        wrong = "" if HUB_ID.fullmatch(repo) else "the owner is missing"
    except HFValidationError as error:
        wrong = str(error).splitlines()[0].rstrip(".")
    if wrong:
        raise LinearizeError(f"{what} '{repo}' names no repository of the hub ({wrong}); write owner/model")


def _hub_id(base: Any) -> str:
    """What a run was given as MODEL, where that is a hub id and no folder here."""
    name = str(base or "").partition("@")[0]
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() and not name.startswith(".") else ""


def _generation(config: Any) -> str:
    from transformers import GenerationConfig

    return str(GenerationConfig.from_model_config(config).to_json_string())


def _card(
    old: str, repo: str, base: str, terms: str, recipe: dict[str, Any], judged: str, quantized: bool
) -> str:
    """The export's own card with the front matter complete, its name filled in, and what was measured and asked for."""
    front, body = _parted(old)
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", **front}
    tags: Sequence[str] = ["linearize", "linear-attention", *(["torchao"] if quantized else [])]
    own = front.get("tags") or []
    own = [str(tag) for tag in own] if isinstance(own, list) else [str(own)]
    front["tags"] = list(dict.fromkeys([*own, *tags]))
    if terms:
        front["license"] = terms
    if base:
        front["base_model"] = base
        front["base_model_relation"] = "quantized" if quantized else "finetune"
    body = body.replace('"PATH"', f'"{repo}"').replace("(PATH,", f'("{repo}",').strip()
    parts = [body]
    if base:
        licensed = f", under its licence, {terms}" if terms else ""
        parts.append(f"## Base model\n\n[{base}](https://huggingface.co/{base}){licensed}.")
    if judged:
        parts.append(f"## Judged by `linearize eval`\n\n{judged}")
    if recipe:
        parts.append(
            f"## Recipe\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```"
        )
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n" + "\n\n".join(parts) + "\n"


def _parted(card: str) -> tuple[dict[str, Any], str]:
    """Front matter and body of a card; a damaged front matter is left out."""
    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if found is None:
        return {}, card
    try:
        front = yaml.safe_load(found[1])
    except yaml.YAMLError:
        front = None
    return (front if isinstance(front, dict) else {}), card[found.end() :]
