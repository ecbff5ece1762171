"""One interface over the tokenizer files that checkpoints come with."""

from __future__ import annotations

import json
import math
import os
import string
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from runtime.json_files import check_no_pointer, one_line, read_object, shown

MOST_BYTES = 2**27  # of a tokenizer's file; the largest that is known to us has 35 MB
MOST_PIECES = 2**24
MOST_GROWTH = 64  # how many times longer a tokenizer may make a text; those that we know keep its length


class Tokenizer:
    """tokenizer.json through tokenizers, tokenizer.model through sentencepiece, or RoBERTa's vocab.json and merges.txt.

    Where tokenizer.json is beside others (Llama 2), it is taken: the same pieces, and the file that Llama 3 has too.

    begin, end: the ids that go before and after a text, by the rules of transformers 5.  tokenizer.json says it itself
    (add_bos_token beside it has no effect); for tokenizer.model, add_bos_token and add_eos_token in
    tokenizer_config.json do, and without that file sentencepiece's own id, as in LLaMA's code.  None where
    tokenizer.json is silent and there is no tokenizer_config.json: then config.json is all there is to go by.
    """

    begin: list[int] | None
    end: list[int] | None

    def __init__(self, directory: str | Path):
        """Raises ValueError for files that are missing, broken, a git-lfs pointer, or of a kind not known here."""
        paths = [Path(directory) / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json")]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ValueError(
                f"{directory} has neither tokenizer.json nor tokenizer.model nor vocab.json and merges.txt"
            )
        check_no_pointer(path)
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size / 2**20:,.0f} MB; at most {MOST_BYTES >> 20} are read")
        self.path, settings = path, _settings(path.parent)
        try:
            with _no_standard_error():
                self._tokenizer = _read(path, settings or {})
                _try_out(self._tokenizer)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers raises Exception, or Rust's panics, sentencepiece RuntimeError
            raise ValueError(f"{path} is not a readable tokenizer: {one_line(str(error), 300)}") from None
        if path.suffix == ".model":
            self.begin, self.end = self._ends_of_pieces(path, settings)
        elif self._tokenizer.post_processor is None:
            self.begin, self.end = (None, None) if settings is None else ([], [])
        else:
            encoded = self._ask(self._tokenizer.encode, "a")
            text = [at for at, special in enumerate(encoded.special_tokens_mask) if not special] or [len(encoded.ids)]
            self.begin, self.end = encoded.ids[: text[0]], encoded.ids[text[-1] + 1 :]

    def _ends_of_pieces(self, path: Path, settings: dict | None) -> tuple[list[int], list[int]]:
        """begin and end of tokenizer.model."""
        if settings is None:
            return [self._tokenizer.bos_id()] if self._tokenizer.bos_id() >= 0 else [], []
        ends = []
        for name, default in ("bos", "<s>"), ("eos", "</s>"):
            token = _spelling(settings.get(f"{name}_token", default))
            added = token is not None and settings.get(f"add_{name}_token")
            if added and self._tokenizer.id_to_piece(self._tokenizer.piece_to_id(str(token))) != token:
                where = path.with_name("tokenizer_config.json")
                raise ValueError(f"{where}: {name}_token {shown(token)} is no piece of {path.name}, such as {default}")
            ends.append([self.id_of(token)] if added else [])
        return ends[0], ends[1]

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without special tokens."""
        if isinstance(self._tokenizer, tokenizers.Tokenizer):
            return self._ask(self._tokenizer.encode, text, add_special_tokens=False).ids
        return self._ask(self._tokenizer.encode, text)

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """The same of many texts, which both libraries do on all cores."""
        if isinstance(self._tokenizer, tokenizers.Tokenizer):
            return [found.ids for found in self._ask(self._tokenizer.encode_batch, texts, add_special_tokens=False)]
        return self._ask(self._tokenizer.encode, texts)

    def decode(self, ids: list[int]) -> str:
        return self._ask(self._tokenizer.decode, ids)

    def _ask(self, act: Callable[..., Any], *args, **options) -> Any:
        """What a library answers.  A file may be readable and still lack what it needs for some texts, which raises
        plain Exception, RuntimeError, or a panic of Rust's, which is none of these."""
        try:
            return act(*args, **options)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            raise ValueError(f"{self.path} cannot be used: {one_line(str(error), 200)}") from None

    @cached_property
    def line_ends(self) -> list[int]:
        """The ids of all pieces that hold a new line."""
        if isinstance(self._tokenizer, tokenizers.Tokenizer):
            pieces = self._tokenizer.get_vocab(with_added_tokens=True).items()
        else:
            pieces = ((self._tokenizer.id_to_piece(i), i) for i in range(self._tokenizer.get_piece_size()))
        signs = ("\n", "\u010a", "<0x0A>")  # as it is; as byte-level BPE spells it; as sentencepiece spells a byte
        candidates = [i for piece, i in pieces if any(sign in piece for sign in signs)]
        return sorted(i for i in candidates if "\n" in self.decode([i]))  # in others \u010a is a letter

    def id_of(self, piece: str) -> int:
        """The id of one piece by its spelling, such as <mask>."""
        if isinstance(self._tokenizer, tokenizers.Tokenizer):
            found = self._tokenizer.token_to_id(piece)
        else:
            found = self._tokenizer.piece_to_id(piece)
            found = found if self._tokenizer.id_to_piece(found) == piece else None  # it answers <unk>'s id instead
        if found is None:
            raise ValueError(f"the tokenizer has no piece {piece!r}")
        return found


def _read(path: Path, settings: dict) -> sentencepiece.SentencePieceProcessor | tokenizers.Tokenizer:
    if path.suffix == ".model":
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    if path.name == "vocab.json":
        return _roberta(path, settings)
    read = tokenizers.Tokenizer.from_file(str(path))
    read.no_truncation()  # a file can ask for either; lengths are handled in scoring.py
    read.no_padding()
    for part in (read.normalizer, read.decoder):
        growth = 1 if part is None else _growth(json.loads(part.__getstate__()))
        if growth > MOST_GROWTH:
            raise ValueError(f"it makes texts up to {growth:.3g} times as long; at most {MOST_GROWTH} is read")
    return read


def _growth(part: Any) -> float:
    """How many times longer the replacements of a normalizer or decoder can make a text, one after the other."""
    if isinstance(part, list):
        return math.prod(map(_growth, part))
    if not isinstance(part, dict):
        return 1
    if part.get("type") == "Replace":
        old = part["pattern"].get("String", "?")  # a regular expression may match a single character
        return max(1, len(part["content"]) / max(1, len(old)))
    return math.prod(map(_growth, part.values()))


def _try_out(tokenizer: sentencepiece.SentencePieceProcessor | tokenizers.Tokenizer) -> None:
    """Raises what a file that reads well makes of a few characters of all kinds, where that is a panic of Rust's."""
    with suppress(Exception):  # which some texts alone raise, as where no piece stands for unknown ones
        encoded = tokenizer.encode(string.printable + "caf\u00e9 \u4e16\u754c \U0001f600<s></s>")
        for i in {*(encoded if isinstance(encoded, list) else encoded.ids)}:
            tokenizer.decode([i])


@contextmanager
def _no_standard_error() -> Iterator[None]:
    """Nothing that the process writes to standard error is seen.  Rust writes a panic's message there, past sys.stderr,
    before Python sees an exception."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _settings(directory: Path) -> dict | None:
    """tokenizer_config.json, with older files' special_tokens_map.json over it; None where there is neither."""
    settings = None
    for path in directory / "tokenizer_config.json", directory / "special_tokens_map.json":
        if path.is_file() and "added_tokens_decoder" not in (settings or {}):
            settings = (settings or {}) | read_object(path)
    return settings


def _spelling(token: object) -> object:
    """A token in tokenizer_config.json is its spelling, or an object that also says how it is found in a text."""
    return token.get("content") if isinstance(token, dict) else token


def _roberta(vocab: Path, settings: dict) -> tokenizers.Tokenizer:
    """vocab.json and merges.txt beside it as RoBERTa's byte-level BPE, with its special tokens."""
    merges = vocab.with_name("merges.txt")
    if not merges.is_file() or merges.stat().st_size > MOST_BYTES:
        raise ValueError(f"merges.txt is missing beside it, or has more than {MOST_BYTES >> 20} MB")
    names = {"cls": "<s>", "sep": "</s>", "bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
    special = {name: settings.get(f"{name}_token") or default for name, default in names.items()}
    later, path = settings.get("added_tokens_decoder") or {}, vocab.with_name("added_tokens.json")
    if not later and path.is_file():
        later = {at: token for token, at in read_object(path).items()}
    pieces = read_object(vocab)
    ids = set(pieces.values()) if all(type(i) is int for i in pieces.values()) else set()
    if not pieces or len(ids) < len(pieces) or not 0 <= min(ids) <= max(ids) < MOST_PIECES:  # tokenizers would take it
        raise ValueError(f"its ids are not {len(pieces):,} different numbers from 0 to {MOST_PIECES - 1:,}")
    for name, token in special.items():
        if not isinstance(_spelling(token), str):
            raise ValueError(f"{name}_token {shown(token)} has no spelling")
    absent = {_spelling(token) for token in special.values()} - set(pieces)
    if absent:  # such as Qwen2, which also splits texts into words by another rule
        without = shown(min(absent))[1:-1]
        raise ValueError(f"it is not RoBERTa's, without {without}; save a tokenizer.json with transformers instead")
    built = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=settings.get("add_prefix_space", False))
    built.decoder = decoders.ByteLevel()
    found = {}
    for token in (*special.values(), *(later[at] for at in sorted(later, key=int))):
        flags = token if isinstance(token, dict) else {}
        flags = {flag: flags[flag] for flag in ("lstrip", "rstrip", "single_word") if flag in flags}
        found[_spelling(token)] = tokenizers.AddedToken(_spelling(token), **flags)
    built.add_special_tokens(list(found.values()))
    wrong = [token for at, token in later.items() if built.token_to_id(_spelling(token)) != int(at)]
    if wrong:
        raise ValueError(f"added token {_spelling(wrong[0])!r} does not follow the ids of {vocab.name}")
    ends = ((_spelling(special[name]), built.token_to_id(_spelling(special[name]))) for name in ("sep", "cls"))
    built.post_processor = processors.RobertaProcessing(*ends)
    return built
