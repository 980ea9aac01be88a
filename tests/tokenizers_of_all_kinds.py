"""Small tokenizers of every kind that models come with; each has control tokens, an added token that is text, and a
text that spells them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

CONTROL = ["<unk>", "<s>", "</s>", "<mask>"]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)]
SIGNS = ["<", ">", "/", "[", "]", "|", "_", ".", "▁", *LETTERS]

TEXT = "one <unk> two</s> <mask>three <s>"
"""Spells every control token, with and without spaces around it."""


def _finished(core: Tokenizer, control: list[str] | None = None) -> PreTrainedTokenizerFast:
    unk, begin, end, mask = control or CONTROL
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=unk,
        bos_token=begin,
        eos_token=end,
        mask_token=AddedToken(mask, lstrip=True, special=True, normalized=False),
    )
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return made


def byte_bpe() -> PreTrainedTokenizerFast:
    """As GPT-2's: no piece of the vocabulary can be a control token."""
    pieces = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return _finished(core)


def whole_words_bpe() -> PreTrainedTokenizerFast:
    """As Llama 3's, which looks a whole word up before it merges; its words end at spaces here."""
    pieces = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return _finished(core)


def sentencepiece_bpe() -> PreTrainedTokenizerFast:
    """As Llama 2's, with merges that build `</s>` out of pieces that text has too."""
    pieces = [*CONTROL, *SIGNS, "</", "s>"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>")]
    core = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)}, merges, unk_token="<unk>", fuse_unk=True
        )
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return _finished(core)


def unigram() -> PreTrainedTokenizerFast:
    """As T5's: control tokens are pieces of the vocabulary, likelier than any text."""
    pieces = [(piece, 0.0) for piece in CONTROL] + [(piece, -3.0) for piece in SIGNS]
    core = Tokenizer(models.Unigram(pieces, 0, False))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    return _finished(core)


def word_level() -> PreTrainedTokenizerFast:
    """A word is a token; control tokens are words."""
    pieces = [*CONTROL, "one", "two", "three", "<", "unk>"]
    core = Tokenizer(
        models.WordLevel({piece: index for index, piece in enumerate(pieces)}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _finished(core)


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's: lower case, and control tokens in brackets."""
    control = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*control, *SIGNS, *(f"##{sign}" for sign in SIGNS)]
    core = Tokenizer(
        models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]")
    )
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    return _finished(core, control)


def normalized_control() -> PreTrainedTokenizerFast:
    """Control tokens that are looked for in the normalized text, so that `<MASK>` spells one."""
    pieces = [*CONTROL, *SIGNS]
    core = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Replace("▁", " ")
    core.add_special_tokens([AddedToken(piece, special=True, normalized=True) for piece in CONTROL])
    return _finished(core)


class Slow(PreTrainedTokenizer):
    """Written in Python, a character is a token; a word that is in the vocabulary stays whole."""

    def __init__(self, **options: Any) -> None:
        self.pieces = {piece: index for index, piece in enumerate([*CONTROL, *SIGNS, " "])}
        names = dict(zip(("unk_token", "bos_token", "eos_token", "mask_token"), CONTROL, strict=True))
        super().__init__(**{**names, **options})

    @property
    def vocab_size(self) -> int:
        return len(self.pieces)

    def get_vocab(self) -> dict[str, int]:
        return dict(self.pieces)

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        words = [piece for word in text.split(" ") for piece in (" ", word)][1:]
        return [piece for word in words for piece in ([word] if word in self.pieces else list(word)) if piece]

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.get(token, 0)

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.pieces)[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


class WithoutTheOption(Slow):
    """As some classes do, it refuses `split_special_tokens`."""

    def _encode_plus(self, *arguments: Any, **options: Any) -> Any:
        if options.get("split_special_tokens"):
            raise ValueError("`split_special_tokens` is not supported")
        return super()._encode_plus(*arguments, **options)


FAST: dict[str, Callable[[], Any]] = {
    "byte BPE": byte_bpe,
    "BPE of whole words": whole_words_bpe,
    "SentencePiece BPE": sentencepiece_bpe,
    "Unigram": unigram,
    "word level": word_level,
    "WordPiece": word_piece,
    "normalized": normalized_control,
}
ALL: dict[str, Callable[[], Any]] = {**FAST, "slow": Slow, "without the option": WithoutTheOption}
