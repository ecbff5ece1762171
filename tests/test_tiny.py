"""The embedded task and model keep what the README says of them, and training them works."""

import json
from collections import Counter
from math import prod

import pytest

import train
from data.files import load_splits
from data.metrics import measure
from data.scoring import Encoder, evaluate
from data.tasks import TASKS, TINY, Row
from data.tiny import make
from data.tokenizer import Tokenizer
from model import load
from runtime.hub import resolve

SPLITS = load_splits(TASKS["tiny"], None, None, None, None, None, num_eval=1000)
TEST = SPLITS.tests["test"]


def sentence_of(row: Row) -> str:
    return row.fields["sentence"]




def test_the_text_can_be_made_again_to_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "HERE", tmp_path)
    make.write_task()
    for name in ("train.tsv", "dev.tsv", "test.tsv"):
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes()
    assert json.loads(make.make_tokenizer().to_str()) == json.loads((TINY / "model" / "tokenizer.json").read_text())


def test_the_model_is_small_and_the_splits_are_disjoint():
    assert sum(f.stat().st_size for f in (TINY / "model").iterdir()) <= 4_000_000
    sentences = [sentence_of(e) for split in (SPLITS.train, SPLITS.dev, TEST) for e in split]
    assert len(sentences) == len(set(sentences)) == 1024 + 256 + 1000


def test_words_alone_do_not_tell():
    """The best one-word rule, chosen on the test set itself: label 1 where the word is there, or where it is not.  And
    naive Bayes on words, trained on train.tsv: what a model blind to word order could reach."""
    bags = [(set(sentence_of(e).split()), int(e.fields["label"])) for e in TEST]
    words = set.union(*(bag for bag, _ in bags))
    rules = [sum((word in bag) == label for bag, label in bags) / len(bags) for word in words]
    assert max(max(right, 1 - right) for right in rules) < 0.60
    by_label = [[e for e in SPLITS.train if e.fields["label"] == label] for label in "01"]
    counts = [Counter(word for e in of_label for word in sentence_of(e).split()) for of_label in by_label]
    odds = [prod((counts[1][w] + 1) / (counts[0][w] + 1) for w in sentence_of(e).split()) for e in TEST]
    assert sum((odd > 1) == int(e.fields["label"]) for odd, e in zip(odds, TEST, strict=True)) / len(bags) < 0.65


def test_zero_shot_leaves_something_to_learn():
    lm = load(resolve("tiny"))
    encode = Encoder(Tokenizer(resolve("tiny")), TASKS["tiny"], lm.config, 64)
    answers = evaluate(lm, [encode(e) for e in TEST], lm.config.pad_token_id, 128).predictions
    assert measure("accuracy", answers) <= 0.65


@pytest.mark.full
@pytest.mark.parametrize("flags", [[], ["--method", "mezo"]])
def test_a_hundred_and_fifty_steps_learn_the_task(tmp_path, flags):
    """Chance is 50 %, with a standard deviation of 1.6 points over 1,000 sentences.  A higher rate than the demo's
    gets there in fewer steps."""
    short = ["--steps", "150", "--eval-every", "50", "--lr", "1e-3", "--out", str(tmp_path / "run")]
    assert train.run(train.parse([*short, *flags]))["test"] >= 0.90
