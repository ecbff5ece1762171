"""One interface over the two tokenizer files that checkpoints come with.

Special tokens are not the tokenizer's business: their ids come from config.json, and callers place them.
"""

from __future__ import annotations

from pathlib import Path

import sentencepiece
import tokenizers


class Tokenizer:
    """tokenizer.json through tokenizers, or tokenizer.model through sentencepiece, whichever is there.

    Where both are (Llama 2), tokenizer.json is taken: the same pieces, and the file that Llama 3 has too.
    """

    def __init__(self, directory: str | Path):
        fast, pieces = Path(directory) / "tokenizer.json", Path(directory) / "tokenizer.model"
        path = fast if fast.is_file() else pieces
        if not path.is_file():
            raise ValueError(f"{directory} has neither tokenizer.json nor tokenizer.model")
        try:
            if path == fast:
                self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
                self._tokenizer.no_truncation()  # a file can ask for either; lengths are handled in scoring.py
                self._tokenizer.no_padding()
            else:
                self._tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except Exception as error:  # tokenizers raises plain Exception, sentencepiece RuntimeError
            raise ValueError(f"{path} is not a readable tokenizer: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without special tokens."""
        if isinstance(self._tokenizer, tokenizers.Tokenizer):
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

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
