"""Both kinds of tokenizer file behind one interface."""

import io

import pytest
import sentencepiece
import tokenizers
import transformers

from data.tokenizer import Tokenizer

TEXTS = (
    "Hello, world!",
    "the film 's a lark , and it 's 12 % better than \"expected\" .",
    "naïve café, 中文, 😀 and a combining e\u0301",
    "tab\tand\nnewline\n\nand a non-breaking\u00a0space",
    "x",
    "",
)


@pytest.fixture
def pieces(tmp_path):
    """A directory with a sentencepiece model of 60 pieces, bytes for what it has never seen."""
    model, texts = io.BytesIO(), ["a great film", "a terrible film", "it was great , it was terrible"] * 20
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type="bpe", vocab_size=256 + 60, byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    return tmp_path


def write_words(directory, words=("<unk>", "<mask>", "it", "was", "great"), **truncation) -> None:
    built = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    built.add_special_tokens(["<mask>"])
    built.post_processor = tokenizers.processors.TemplateProcessing(single="<mask> $A", special_tokens=[("<mask>", 1)])
    if truncation:
        built.enable_truncation(**truncation)
        built.enable_padding(length=8)
    built.save(str(directory / "tokenizer.json"))


def test_tokenizer_json(pieces):
    """The oracle is the vocabulary as written.  Its template would put <mask> first, and a file can ask for truncation
    and padding; callers see to both.  It goes before tokenizer.model."""
    for truncation in ({}, {"max_length": 2}):
        write_words(pieces, **truncation)
        tokenizer = Tokenizer(pieces)
        assert tokenizer.encode("it was great was it") == [2, 3, 4, 3, 2]
        assert tokenizer.encode("it") == [2] and tokenizer.encode("it was awful") == [2, 3, 0]
        assert tokenizer.decode([2, 3, 4]) == "it was great"
        assert tokenizer.id_of("<mask>") == 1


def test_tokenizer_model(pieces):
    """The oracle is the round trip, which byte fallback makes exact for any text."""
    tokenizer = Tokenizer(pieces)
    for text in TEXTS:
        if "\u0301" not in text and "\n" not in text:  # sentencepiece's default NFKC composes one, spaces the other
            assert tokenizer.decode(tokenizer.encode(text)) == text
    unseen = tokenizer.encode("a great film")
    assert len(unseen) < len("a great film") and min(unseen) > 2  # pieces, and neither <unk> nor <s> nor </s>
    assert [tokenizer.id_of(piece) for piece in ("<unk>", "<s>", "</s>", "<0x41>")] == [0, 1, 2, 3 + 0x41]


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has neither tokenizer.json nor tokenizer.model"):
        Tokenizer(tmp_path)
    for name in ("tokenizer.model", "tokenizer.json"):
        for content in (b"", b"{", b"{}", b"\x80\x04\x95 no pickle", b"\xff" * 100):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{tmp_path / name} is not a readable tokenizer"):
                Tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_an_unknown_piece_is_refused(kind, pieces):
    """sentencepiece itself answers an unknown piece with the id of <unk>."""
    if kind == "tokenizer.json":
        write_words(pieces)
    for piece in ("<no such piece>", ""):
        with pytest.raises(ValueError, match=f"no piece {piece!r}"):
            Tokenizer(pieces).id_of(piece)


def sentences(real_data) -> list[str]:
    lines = (real_data("SST-2") / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return [line.rpartition("\t")[0] for line in lines]


def test_real_roberta_gives_the_ids_of_transformers(real_model, real_data):
    directory = real_model("zoroberta-26m")
    ours, theirs = Tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    for text in (*TEXTS, " It was terrible", "  two  spaces "):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == text
    assert ours.id_of("<mask>") == theirs.mask_token_id
    texts = sentences(real_data)
    assert [ours.encode(text) for text in texts] == theirs(texts, add_special_tokens=False)["input_ids"]


def test_real_llama_gives_known_ids(real_model):
    """The ids of these sentences in LLaMA's vocabulary are printed all over its documentation."""
    tokenizer = Tokenizer(real_model("zollama-28m"))
    assert tokenizer.encode("Hello world") == [15043, 3186]
    assert tokenizer.encode("Hello, world!") == [15043, 29892, 3186, 29991]
    assert [tokenizer.id_of(piece) for piece in ("<unk>", "<s>", "</s>", "<0x0A>")] == [0, 1, 2, 13]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in (*TEXTS, "  two  spaces "))


@pytest.mark.full
def test_real_llama_gives_the_ids_of_transformers(real_model, real_data):
    """LlamaTokenizer, since AutoTokenizer needs a tokenizer_config.json to know the kind.  It drops spaces at the
    start and merges repeated ones otherwise than sentencepiece does, so the texts have neither.
    """
    pytest.importorskip("google.protobuf", reason="transformers reads tokenizer.model with protobuf")
    directory = real_model("zollama-28m")
    ours, theirs = Tokenizer(directory), transformers.LlamaTokenizer.from_pretrained(directory)
    texts = [*TEXTS, *(" ".join(text.split()) for text in sentences(real_data))]
    assert [ours.encode(text) for text in texts] == [theirs.encode(text, add_special_tokens=False) for text in texts]
