"""Pre-training from scratch: the text is split and packed without loss, the masking is BERT's, and a model comes out
that learned, that two equal commands agree on, and that `transformers` reads."""

import json
import lzma
import random

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from helpers import largest_gap, oracle_logits, read_oracle, tiny_llama, tiny_roberta

from benchmarks import pretrain
from data.tasks import TINY
from data.tiny import make
from data.tokenizer import Tokenizer
from model import create, load
from runtime.checkpoints import weights_sha256

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SHORT = "--steps 40 --batch-size 16 --length 24 --lr 3e-3 --warmup 4 --held-out 60".split()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """600 documents of the embedded task, every one with a number that no other has."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.txt.xz"
    path.write_bytes(lzma.compress("\0".join(f"{make.document(rng)} n{i}" for i in range(600)).encode()))
    return path


@pytest.fixture(scope="module")
def like(tmp_path_factory, text):
    """like("llama"), like("roberta"): folders with a config.json and a tokenizer of one token a word; no weights."""
    documents, _ = pretrain.read_documents(text)
    words = sorted({word for document in documents for word in document.split()})
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    configs = {
        "llama": tiny_llama(bos_token_id=0, eos_token_id=2, pad_token_id=1, tie_word_embeddings=True),
        "roberta": tiny_roberta(),
    }
    root = tmp_path_factory.mktemp("like")
    for name, raw in configs.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(raw | {"vocab_size": len(SPECIAL) + len(words)}))
        tokenizer.save(str(root / name / "tokenizer.json"))
    return lambda name: root / name


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch):
    """Also where there is a GPU, as tests/conftest.py has it."""
    monkeypatch.setattr(pretrain, "best_device", lambda: "cpu")


def run(capsys, like, text, out, *flags) -> dict:
    argv = ["--like", str(like), "--text", str(text), "--out", str(out), *SHORT, *flags]
    assert pretrain.main(argv) == 0
    return json.loads(capsys.readouterr().out)


def stream(tokens, length=8, next_token=True) -> pretrain.Stream:
    return pretrain.Stream(np.array(tokens, np.uint16), length, next_token)


# ---------------------------------------------------------------- documents and rows


def test_held_out_documents_are_not_trained_on_even_where_they_are_there_twice():
    documents = [f"document {i}" for i in range(200)] * 2
    train, held_out = pretrain.hold_out(documents, 0.1, seed=0)
    assert len(held_out) == 40 and len(set(held_out)) == 20
    assert not set(train) & set(held_out) and sorted(train + held_out) == sorted(documents)
    assert pretrain.hold_out(documents, 20, seed=0) == (train, held_out)
    assert pretrain.hold_out(documents, 20, seed=1) != (train, held_out)


def test_no_token_of_a_held_out_document_reaches_a_training_batch(like, text):
    """A document's number is a word of its own, so the numbers that were seen name the documents."""
    documents, _ = pretrain.read_documents(text)
    sides = pretrain.hold_out(documents, 60, seed=0)
    args = pretrain.parse(["--like", str(like("llama")), "--text", "", "--out", "", "--length", "24"])
    config = pretrain.read_config(args.like)[0]
    seen, tokenizer = [], Tokenizer(args.like)
    for side in pretrain.streams(args, config, sides):
        batch = pretrain.make_batch(side, np.arange(len(side)), None, (), "cpu")
        words = {tokenizer.decode([i]) for i in (*batch.tokens[batch.mask.bool()].tolist(), *batch.targets.tolist())}
        seen.append({word for word in words if word[0] == "n" and word[1:].isdigit()})
    assert len(seen[0]) == 540 and len(seen[1]) == 60 and not seen[0] & seen[1]


@pytest.mark.parametrize("n", [15, 16, 17, 18, 24])
def test_every_token_but_the_first_is_a_target_once(n):
    packed = stream(range(n))
    batch = pretrain.make_batch(packed, np.arange(len(packed)), None, (), "cpu")
    assert batch.targets.tolist() == list(range(1, n))
    before = batch.tokens.flatten()[batch.at]
    assert before.tolist() == list(range(n - 1)) and batch.mask.flatten()[batch.at].all()


@pytest.mark.parametrize("n", [15, 16, 17])
def test_every_token_is_in_one_row_of_a_masked_model(n):
    packed = stream(range(n), next_token=False)
    nothing_masked = pretrain.Masking(n, n, tuple(range(n)))
    batch = pretrain.make_batch(packed, np.arange(len(packed)), nothing_masked, (), "cpu")
    assert batch.tokens[batch.mask.bool()].tolist() == list(range(n)) and not len(batch.targets)


@pytest.mark.full
def test_parallel_processes_give_the_same_tokens_with_begin_and_end(like, text, monkeypatch):
    monkeypatch.setattr(pretrain, "DOCUMENTS_A_JOB", 300)
    documents, _ = pretrain.read_documents(text)
    sides, ends = (documents[:400], documents[400:]), pretrain.Ends((0,), (2,))
    alone, together = (pretrain.encode_sides(like("roberta"), ends, 2000, sides, n) for n in (1, 2))
    encode = Tokenizer(like("roberta")).encode
    for side, one, two in zip(sides, alone, together, strict=True):
        assert one.dtype == np.uint16 and one.tolist() == two.tolist()
        assert one.tolist() == [token for d in side for token in (0, *encode(d), 2)]


def test_a_large_vocabulary_is_not_cut_to_16_bits(like):
    for vocabulary, kind in ((2**16, np.uint16), (2**16 + 1, np.int32)):
        ends = pretrain.Ends((vocabulary - 1,), ())
        tokens = pretrain.encode_documents(like("llama"), ends, vocabulary, ["the film was dull"])
        assert tokens.dtype == kind and tokens[0] == vocabulary - 1


# ---------------------------------------------------------------- the objective


def test_masking_is_fifteen_percent_in_parts_of_eighty_ten_ten():
    n, vocabulary, mask, special = 400_000, 1000, 4, (0, 1, 2, 4)
    rng = np.random.default_rng(0)
    tokens = rng.integers(vocabulary, size=(n // 100, 100))
    real = rng.random(tokens.shape) < 0.9
    seen, chosen = pretrain.Masking(mask, vocabulary, special)(tokens, real, pretrain.keyed(0))
    maskable = real & ~np.isin(tokens, special)
    assert not chosen[~maskable].any() and (seen == tokens)[~chosen].all()

    def share(part, whole, expected):
        five_sigma = 5 * (expected * (1 - expected) / whole.sum()) ** 0.5
        assert abs((part & whole).sum() / whole.sum() - expected) < five_sigma

    share(chosen, maskable, 0.15)
    share(seen == mask, chosen, 0.8 + 0.1 / vocabulary)
    share(seen == tokens, chosen, 0.1 + 0.1 / vocabulary)
    random = chosen & (seen != mask) & (seen != tokens)
    counts = np.bincount(seen[random], minlength=vocabulary)
    assert (counts > 0).mean() > 0.95  # of 5,300 draws over 1,000 words; 99.5 % are expected


def test_masked_targets_are_the_original_tokens_and_draws_have_keys():
    tokens = np.random.default_rng(0).integers(5, 1000, size=4096)
    packed, masking = stream(tokens, 64, next_token=False), pretrain.Masking(4, 1000, (0, 1, 2, 4))
    batch, again, other = (
        pretrain.make_batch(packed, np.arange(64), masking, (0, "training", step), "cpu") for step in (7, 7, 8)
    )
    assert batch.targets.tolist() == tokens[batch.at].tolist() and (batch.tokens.flatten()[batch.at] == 4).any()
    assert torch.equal(batch.tokens, again.tokens) and torch.equal(batch.at, again.at)
    assert not torch.equal(batch.tokens, other.tokens)


@pytest.mark.parametrize("raw", [tiny_llama(), tiny_roberta()], ids=["llama", "roberta"])
def test_held_out_loss_is_the_mean_over_targets_of_whole_forwards(raw, monkeypatch):
    """Against every row on its own through all logits; the padded last row and batches of unequal size count right."""
    monkeypatch.setattr(pretrain, "EVAL_ROWS", 3)
    lm, masked = create(raw), raw["model_type"] == "roberta"
    packed = stream(np.random.default_rng(0).integers(5, 97, size=77), next_token=not masked)
    masking = pretrain.Masking(4, 97, (0, 1, 2, 4)) if masked else None
    total, count = 0.0, 0
    for start in range(0, len(packed), 3):
        index = np.arange(start, min(start + 3, len(packed)))
        batch = pretrain.make_batch(packed, index, masking, (0, "held out", start), "cpu")
        row, column = np.divmod(batch.at.numpy(), 8)
        for r in range(len(index)):
            logits = lm(batch.tokens[r : r + 1], batch.mask[r : r + 1])[0, column[row == r]]
            total += F.cross_entropy(logits, batch.targets[row == r], reduction="sum").item()
            count += (row == r).sum()
    assert pretrain.held_out_loss(lm, packed, masking, seed=0) == pytest.approx(total / count, abs=1e-5)
    assert masked or count == 76


# ---------------------------------------------------------------- whole runs


def test_the_rate_rises_to_its_peak_and_falls_to_nothing():
    rates = [pretrain.learning_rate(step, 1.0, 4, 20) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == pytest.approx([k / 16 for k in range(15, 0, -1)])


@pytest.mark.parametrize("kind", ["llama", "roberta"])
def test_loss_falls_and_the_directory_loads_here_and_in_transformers(kind, like, text, tmp_path, capsys):
    result = run(capsys, like(kind), text, tmp_path / "new")
    at_random = np.log(json.loads((like(kind) / "config.json").read_text())["vocab_size"])  # 6.5
    assert result["held_out_loss"] < at_random - 1
    lm = load(tmp_path / "new")
    assert weights_sha256(lm.weights) == result["weights_sha256"]
    assert Tokenizer(tmp_path / "new").encode("the film") == Tokenizer(like(kind)).encode("the film")
    record = json.loads((tmp_path / "new" / "pretraining.json").read_text())
    assert record["held_out_loss"] == result["held_out_loss"] and record["flags"]["held_out"] == 60
    tokens = torch.randint(5, lm.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(0))
    oracle = read_oracle(tmp_path / "new", lm.raw_config)
    assert largest_gap(lm(tokens), oracle_logits(oracle, tokens)) < 1e-4


def test_the_same_seed_gives_the_same_bits_and_another_does_not(like, text, tmp_path, capsys):
    few = ("--steps", "3", "--warmup", "1")
    one, same, other = (
        run(capsys, like("roberta"), text, tmp_path / f"{i}", *few, "--seed", seed)["weights_sha256"]
        for i, seed in enumerate("001")
    )
    assert one == same != other


def test_every_draw_is_keyed_by_the_seed(like, text, tmp_path, capsys, monkeypatch):
    """The held-out documents, the order, both maskings; the weights are the next test's matter."""
    seeds = {"order": set(), "masking": set(), "held out": set()}

    def spy(use, name, seed_of):
        original = getattr(pretrain, name)
        monkeypatch.setattr(pretrain, name, lambda *key: seeds[use].add(seed_of(key)) or original(*key))

    spy("order", "batch_indices", lambda key: key[0])
    spy("masking", "keyed", lambda key: key[:2])
    spy("held out", "hold_out", lambda key: key[2])
    run(capsys, like("roberta"), text, tmp_path / "new", "--steps", "2", "--warmup", "0", "--seed", "7")
    assert seeds == {"order": {7}, "masking": {(7, "training"), (7, "held out")}, "held out": {7}}


def test_the_shape_comes_from_the_directory_and_never_its_weights(text, tmp_path, capsys):
    """data/tiny/model has trained weights: a model that took them would start far below chance."""
    few = ("--steps", "1", "--warmup", "0", "--lr", "0", "--seed", "7")
    result = run(capsys, TINY / "model", text, tmp_path / "new", *few)
    raw = load(TINY / "model").raw_config
    assert result["train_loss"] == pytest.approx(np.log(raw["vocab_size"]), abs=0.2)
    assert weights_sha256(load(tmp_path / "new").weights) == weights_sha256(create(raw, seed=7).weights)


def test_bf16_halves_the_file_and_compute_and_epochs_are_heard(like, text, tmp_path, capsys):
    flags = "--epochs 0.1 --batch-size 16 --length 24 --lr 3e-3 --held-out 60".split()
    argv = ["--like", str(like("llama")), "--text", str(text), *flags]
    for out, *more in ("a",), ("b", "--save", "bf16"), ("c", "--compute", "bf16"):
        assert pretrain.main([*argv, "--out", str(tmp_path / out), *more]) == 0
    a, b, c = map(json.loads, capsys.readouterr().out.splitlines())
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in "ab"]
    assert 0.45 < sizes[1] / sizes[0] < 0.55 and weights_sha256(load(tmp_path / "b").weights) == b["weights_sha256"]
    rows = -(-(a["train_tokens"] - 1) // 24)
    assert a["steps"] == -(-rows // 160)
    assert a["train_loss"] == b["train_loss"] != c["train_loss"] == pytest.approx(a["train_loss"], abs=0.02)


@pytest.mark.parametrize("name, off", [("CLIP", 0.0), ("learning_rate", lambda *_: 0.0)])
def test_clipping_and_the_schedule_are_applied(name, off, like, text, tmp_path, capsys, monkeypatch):
    """Gradients clipped to nothing, or a rate of 0, leave the random weights as they were."""
    monkeypatch.setattr(pretrain, name, off)
    run(capsys, like("roberta"), text, tmp_path / "new", "--steps", "3", "--warmup", "0", "--weight-decay", "0")
    lm = load(tmp_path / "new")
    assert weights_sha256(lm.weights) == weights_sha256(create(lm.raw_config, seed=0).weights)


def test_compiling_takes_the_block_and_the_loss_and_changes_nothing(like, text, tmp_path, capsys, monkeypatch):
    """Without the compiler itself, which takes half a minute."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(f) or f)
    few = ("--steps", "2", "--warmup", "0")
    plain, other = (
        run(capsys, like("llama"), text, tmp_path / flag, *few, flag)["weights_sha256"]
        for flag in ("--no-compile", "--compile")
    )
    assert plain == other and len(compiled) == 2


def test_only_matrices_decay(like, text, tmp_path, capsys):
    """At rate 1 and decay 1 the last step of the schedule would take a decayed norm to 0."""
    weights = {}
    for decay in ("0", "100"):
        run(capsys, like("llama"), text, tmp_path / decay, "--steps", "1", "--warmup", "0", "--weight-decay", decay)
        weights[decay] = load(tmp_path / decay).weights
    for name, stored in weights["0"].items():
        assert torch.equal(stored.value, weights["100"][name].value) == (stored.value.ndim == 1)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--text nowhere.txt", "nowhere.txt"),
        ("--like nowhere", "no config.json"),
        ("--held-out 600", "--held-out"),
        ("--held-out 1.5", "--held-out"),
        ("--length 1000", "--length 1000 is over"),
        ("--steps 0", "--steps must be at least 1"),
        ("--warmup 40", "--warmup 40"),
        ("--lr nan", "--lr"),
        ("--epochs 1", "not allowed with"),
        ("--lr 1e9", "not finite"),
        ("--nonsense 1", "--nonsense"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, message, like, text, tmp_path, capsys):
    argv = ["--like", str(like("llama")), "--text", str(text), "--out", str(tmp_path / "new"), *SHORT]
    assert pretrain.main([*argv, *flags.split()]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("pretrain.py: ") and message in last
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "name, content",
    [("cut.xz", lzma.compress(b"a\0b" * 99)[:-9]), ("no.xz", b"text"), ("latin.txt", b"caf\xe9\0b")],
    ids=["truncated", "not xz", "not UTF-8"],
)
def test_a_broken_text_file_is_named(name, content, like, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    flags = ["--like", str(like("llama")), "--text", str(tmp_path / name), "--out", str(tmp_path / "new"), *SHORT]
    assert pretrain.main(flags) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and name in errors[0]


def test_a_folder_that_is_not_empty_is_refused_before_training(like, text, tmp_path, capsys):
    (tmp_path / "notes").write_text("mine")
    argv = ["--like", str(like("llama")), "--text", str(text), "--out", str(tmp_path), *SHORT]
    assert pretrain.main(argv) == 2
    assert "not empty" in capsys.readouterr().err and (tmp_path / "notes").read_text() == "mine"


def test_defaults_come_from_the_record_and_a_missing_one_is_named(like, tmp_path, capsys):
    argv = ["--like", str(tmp_path), "--text", "text", "--out", "out"]
    (tmp_path / "pretraining.json").write_text(json.dumps({"batch": 8, "seq": 16, "lr": 0.002}))
    assert pretrain.main(argv) == 2 and "no 'steps' of type int: give --steps" in capsys.readouterr().err
    args = pretrain.parse([*argv, "--epochs", "2", "--lr", "0.1"])
    pretrain.resolve(args)
    assert (args.batch_size, args.length, args.lr, args.steps) == (8, 16, 0.1, None)
