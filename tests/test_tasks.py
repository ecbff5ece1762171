"""Metrics, the loss of answers alone, options of any number, texts that a model writes, and tasks of one's own."""

import json
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from helpers import random_oracle, read_oracle, tiny_llama, tiny_roberta
from tokenizers import decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from torch.nn.utils.rnn import pad_sequence

from data import scoring
from data.files import load_splits
from data.metrics import Prediction, exact_match, f1, measure
from data.scoring import BatchLoss, Encoded, Encoder, collate, evaluate, option_scores, write
from data.tasks import TASKS, Example, Row, Task, get_task
from data.tokenizer import Tokenizer
from model import create, load
from runtime.model_configs import config_of

CPU = torch.device("cpu")

# ---------------------------------------------------------------- metrics, by hand

F1 = [  # answer, right ones, the best F1: twice the words that both have, over the words of both
    ("The Denver Broncos!", ("denver  broncos",), 1), ("Denver", ("Denver Broncos",), 2 / 3), ("Denver", ("No",), 0),
    ("no no", ("no no yes",), 4 / 5), ("yes yes yes", ("yes",), 2 / 4),  # a word counts as often as both have it
    ("U.S. theatre", ("us theatre",), 1), ("a to-day\nbit", ("today bit",), 1), ("An A.D. 9, the\tII", ("ad 9 ii",), 1),
    ("", ("",), 1), ("", ("the",), 1), ("", ("Denver",), 0), ("Denver", ("",), 0), ("a", ("an", "b"), 1),
    ("the Broncos", ("Denver", "Denver Broncos", "Broncos of Denver"), 2 / 3), ("Bo", ("Ann", "bo.", "Bo Lee"), 1),
]  # fmt: skip


def chose(option: int, *golds: int, group: str = "", options: tuple[str, ...] = (" No", " Yes", " Maybe")):
    return Prediction(options[option].strip(), option, golds, group, (0.0,) * len(options), options)


def wrote(text: str, *golds: str) -> Prediction:
    return Prediction(text, 0, golds, "", (), ())


@pytest.mark.parametrize("answer, golds, expected", F1)
def test_f1_and_exact_match_are_squads(answer, golds, expected):
    assert f1(wrote(answer, *golds)) == pytest.approx(expected)
    assert exact_match(wrote(answer, *golds)) == (expected == 1)


def test_metrics_of_a_whole_split():
    """CB: class 0 is said of three and right of three, two of them the same, so its F1 is 4/6; class 1 is said of two
    and right of one, 2/3; class 2 is never said, 0.  MultiRC: "yes" is said of three and right of three, two the same;
    of three questions one has no wrong answer."""
    cb = [chose(*pair) for pair in ((0, 0), (0, 0), (1, 0), (1, 1), (0, 2))]
    assert measure("f1_macro", cb) == pytest.approx((4 / 6 + 2 / 3 + 0) / 3)
    assert measure("f1_macro", [chose(0, 0), chose(2, 2)]) == 1  # nothing is said or right of class 1
    said = [(1, 1, "0, 0"), (1, 0, "0, 1"), (0, 1, "1, 0"), (1, 1, "0, 1"), (0, 0, "0, 0")]
    multirc = [chose(option, gold, group=group) for option, gold, group in said]
    assert measure("f1a", multirc) == pytest.approx(4 / 6) and measure("accuracy", multirc) == 3 / 5
    assert measure("exact_questions", multirc) == pytest.approx(1 / 3) and measure("f1a", [chose(0, 0)]) == 0
    assert measure("f1", [wrote("a b", "b"), wrote("b c", "b")]) == pytest.approx((1 + 2 / 3) / 2)
    record = [chose(option, 0, 2, options=("Ann Lee", "Lee", "Cy")) for option in (2, 1, 0)]  # two are right
    assert [measure("accuracy", [p]) for p in record] == [1, 0, 1] and f1(record[1]) == pytest.approx(2 / 3)
    assert measure("accuracy", [wrote("The Bo", "bo"), wrote("Bo", "Cy")]) == 1 / 2  # of texts, exact match


def test_a_metric_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_metric.py").write_text("def longer(text, golds):\n    return len(text) - max(map(len, golds))\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert measure("own_metric:longer", [wrote("four", "a", "abc"), chose(1, 0, 2)]) == (1 - 2) / 2
    for name, message in (
        ("bleu", "unknown metric 'bleu' of an answer; known: accuracy, f1, .*f1a, exact_questions, or module:function"),
        ("no_module:f", "metric 'no_module:f': No mod"), ("own_metric:g", "metric 'own_metric:g': .*no attribute 'g'"),
        ("math:pi", "is no function but 3.14"), ("math:sqrt", "failed on 'a' and \\['a'\\]: TypeError"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(name, [wrote("a", "a")])


# ---------------------------------------------------------------- losses and scores, against transformers
# What is left is float32 rounding: 1e-5 in a tiny model, and 1e-4 in logits of ten layers.

SENTENCES = [{"sentence": "a great film .", "label": 1}, {"sentence": "dull", "label": "0"}]
CAUSES = [{"premise": "It rained.", "question": question, "label": label, "choice1": "I slept.", "choice2": choice}
          for question, label, choice in (("cause", 0, "The grass was cut."), ("effect", 1, "Many streets got wet."))]
RECORDS = [{"passage": passage, "entities": names, "label": label, "choices": [f" {name} {end}" for name in names]}
           for passage, names, label, end in (("Ann met.\n@highlight\nA", ["Ann", "Bo Lee", "Rome"], [1, 2], "won."),
                                              ("Cy waits.", ["Cy"], [0], "will not wait for long."),
                                              ("Di and Ed left.", ["Di", "Ed"], [1], "left"))]  # fmt: skip
QUESTIONS = [dict(zip(("title", "context", "question", "answers"), row, strict=True)) for row in (
    ("Super_Bowl_50", "The Denver Broncos won the game on February 7, 2016.", "Who won?", ["Denver Broncos", "Denver"]),
    ("Rain", "It rains.", "What does it do? ", ["It rains"]),
    ("Oxygen", "Oxygen has the symbol O and atomic number 8.", "Its number?", ["8"]))]  # fmt: skip


def encoded(prompt: list[int], *options: list[int], right: tuple[int, ...] = (0,)) -> Encoded:
    example = Example((), 0, tuple(map(str, options)), right[0], right)
    return Encoded([[1, *prompt, *option] for option in options], list(options), -1, right[0], example)


ANSWERS = [encoded([5, 6], [7, 8, 9]), encoded(list(range(20, 28)), [3]), encoded([30], [31], [32, 33], right=(1,))]


def loss_of_transformers(oracle, sequences: list[list[int]], answers: list[list[int]]) -> float:
    """Its mean over the answers' tokens: the other labels are -100."""
    pairs = list(zip(sequences, answers, strict=True))
    labels = [torch.tensor([-100] * (len(sequence) - len(answer)) + answer) for sequence, answer in pairs]
    tokens = pad_sequence(list(map(torch.tensor, sequences)), batch_first=True)
    with torch.no_grad():
        return oracle(input_ids=tokens, labels=pad_sequence(labels, True, -100)).loss.item()


def check_answer_loss(lm, oracle, examples: list[Encoded], atol: float) -> None:
    """Also in micro-batches, in parts, with more padding, and in an evaluation."""
    right = [e.sequences[e.label] for e in examples], [e.answers[e.label] for e in examples]
    want, view = pytest.approx(loss_of_transformers(oracle, *right), abs=atol), lm.stored_view()
    assert len({len(answer) for answer in right[1]}) > 1, "answers of one length could not show how they are weighed"
    for micro_batch_size in (1, 2, 3):
        for multiple in (1, 64):
            loss_fn = BatchLoss.of(lm, examples, 0, micro_batch_size, multiple, "answer")
            assert loss_fn(view).item() == want and sum(loss_fn.parts(view)).item() == want
        assert evaluate(lm, examples, 0, micro_batch_size, "answer").loss == want


def test_the_loss_of_answers_is_that_of_transformers(tmp_path):
    oracle = random_oracle(tiny_llama(), tmp_path)
    check_answer_loss(load(tmp_path), oracle, ANSWERS, 1e-5)


@pytest.fixture(scope="module")
def zollama(real_model):
    directory = real_model("zollama-28m")
    raw = json.loads((directory / "config.json").read_text())
    return load(directory), read_oracle(directory, raw), Tokenizer(directory)


def encode_all(name: str, rows: list[dict], tokenizer, config, share: bool = True, **options) -> list[Encoded]:
    encode = Encoder(tokenizer, TASKS[name], config, 512, share)
    return [encode(Row("here", row), **options) for row in rows]


@pytest.mark.full
@pytest.mark.parametrize("name, rows", [("squad", QUESTIONS), ("copa", CAUSES), ("record", RECORDS)])
def test_the_loss_of_real_answers_is_that_of_transformers(zollama, name, rows):
    lm, oracle, tokenizer = zollama
    for right_alone in (True, False):
        examples = encode_all(name, rows, tokenizer, lm.config, right_alone=right_alone)
        check_answer_loss(lm, oracle, examples, 1e-4)


@pytest.mark.full
@pytest.mark.parametrize("name, rows, share", [("sst2", SENTENCES, True), ("sst2", SENTENCES, False),
                                               ("copa", CAUSES, True), ("record", RECORDS, True)])  # fmt: skip
def test_options_scores_are_mean_log_probabilities_of_transformers(zollama, name, rows, share):
    """Where options of one token are read off one forward, up to a constant, which log_softmax takes away."""
    lm, oracle, tokenizer = zollama
    examples, apart = (encode_all(name, rows, tokenizer, lm.config, of) for of in (share, False))
    for tokens in (0, 99):
        scores, _ = option_scores(lm, collate(examples, 0, CPU, tokens), lm.stored_view())
        for e, got in zip(apart, scores[0], strict=True):
            pairs = zip(e.sequences, e.answers, strict=True)
            want = torch.tensor([-loss_of_transformers(oracle, [sequence], [answer]) for sequence, answer in pairs])
            of = torch.log_softmax if examples[0].at >= 0 else lambda scores, _: scores
            torch.testing.assert_close(of(got[: len(want)], -1), of(want, -1), atol=1e-4, rtol=0)


def test_examples_of_different_numbers_of_options_are_judged_as_alone(tmp_path):
    """An option that an example lacks has no score, and is never chosen."""
    random_oracle(tiny_llama(), tmp_path)
    lm = load(tmp_path)
    options = [[[40 + i, 50 + j, *range(60, 60 + j)] for j in range(n)] for i, n in enumerate((2, 5, 1, 3, 4))]
    examples = [encoded(list(range(5, 7 + i)), *of, right=(len(of) - 1, 0)) for i, of in enumerate(options)]
    alone = [evaluate(lm, [e], 0, 1) for e in examples]
    for size in (2, 5):
        together = evaluate(lm, examples, 0, size)
        assert together.loss == pytest.approx(sum(a.loss for a in alone) / 5, abs=1e-5)
        for e, got, single in zip(examples, together.predictions, alone, strict=True):
            assert got.scores == pytest.approx(single.predictions[0].scores, abs=1e-5)
            assert len(got.scores) == len(e.answers) and got.golds == e.example.golds
            assert got.option == got.scores.index(max(got.scores)) and got.text == e.example.options[got.option]
    assert len({p.option for p in together.predictions}) > 1


def test_many_options_make_smaller_batches_of_an_evaluation(monkeypatch):
    """Each token of an option has the whole vocabulary's scores; what the model chooses does not change."""
    lm, counts = create(tiny_llama(), seed=3), (2, 5, 1, 3, 4, 1)
    options = [[[40 + i, 50 + j, *range(60, 60 + j)] for j in range(n)] for i, n in enumerate(counts)]
    examples = [encoded(list(range(5, 7 + i)), *of, right=(len(of) - 1, 0)) for i, of in enumerate(options)]
    reads, want = [sum(map(len, e.answers)) for e in examples], evaluate(lm, examples, 0, 4)
    assert reads == [5, 20, 2, 9, 14, 2] and [len(at) for at in scoring._batches(examples, 4)] == [4, 2]
    monkeypatch.setattr(scoring, "MOST_READS", 16)
    assert list(scoring._batches(examples, 4)) == [[0], [1], [2, 3], [4, 5]]
    got = evaluate(lm, examples, 0, 4)
    assert got.loss == pytest.approx(want.loss, abs=1e-6)
    assert [p.option for p in got.predictions] == [p.option for p in want.predictions]


def test_the_loss_of_answers_of_one_token_is_a_log_probability_too():
    lm, example = create(tiny_llama(), seed=3), encoded([5], [7], [8], right=(1,))
    shared = Encoded([[1, 5]], [[7], [8]], 1, 1, example.example)
    assert evaluate(lm, [shared], 0, 1, "answer").loss == pytest.approx(evaluate(lm, [example], 0, 1, "answer").loss)


def test_a_masked_model_learns_no_answers():
    """Its options are words at one place; it cannot continue a text."""
    task = Task("t", cloze="{text} <mask>", options={"0": " bad", "1": " good"}, loss="answer")
    with pytest.raises(ValueError, match="the loss of an answer is for causal models"):
        Encoder(SimpleNamespace(begin=[0], end=[2]), task, config_of(tiny_roberta()), 16)


def test_the_reads_of_a_batch_are_a_multiple_too():
    batch = collate(ANSWERS, 0, CPU, multiple=8)
    assert len(batch.row) % 8 == len(batch.target) % 8 == 0


# ---------------------------------------------------------------- texts that a model writes

PIECES = "<s> </s> <pad> 1 2 3 4 5 a b c d e x ! \u0120 \u010a !\u010a a\u010a a\u010ab".split()
SPECIAL = dict(vocab_size=len(PIECES), bos_token_id=0, eos_token_id=1, pad_token_id=2)
WRITTEN = {"1 a b ~ x": ("ab", 3), "2 c !~ x": ("c!", 2), "3 d a~b x": ("da", 2), "4 _ a~ x": ("a", 2),
           "5 e </s> x": ("e", 2), "x x": ("x" * 50, 50)}  # fmt: skip


def bytewise(directory) -> Tokenizer:
    """Byte-level BPE of PIECES, some of which hold a new line inside other characters."""
    merges = [("!", "\u010a"), ("a", "\u010a"), ("a\u010a", "b")]
    built = tokenizers.Tokenizer(BPE({piece: i for i, piece in enumerate(PIECES)}, merges))
    built.pre_tokenizer, built.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    built.add_special_tokens(PIECES[:3])
    built.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


def wordwise(directory, words: list[str]) -> Tokenizer:
    built = tokenizers.Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


def chained(*chains: str, **changes):
    """A model that writes after each piece the one that follows it here: blocks add nothing to a one-hot embedding."""
    lm = create(tiny_llama(**SPECIAL | changes, hidden_size=len(PIECES), head_dim=8))
    for name, stored in lm.weights.items():
        stored.value.fill_(float("norm" in name))
    lm.weights[lm.embedding].value.copy_(torch.eye(len(PIECES)))
    for chain in chains:
        ids = [PIECES.index(piece) for piece in chain.replace("~", "\u010a").replace("_", "\u0120").split()]
        lm.weights[lm.decoder].value[ids[1:], ids[:-1]] = 1
    return lm


def to_write(prompt: list[int]) -> Encoded:
    example = Example((), 0, ("a\n",), 0, ("a", str(prompt)), str(len(prompt)))
    return Encoded([[*prompt, 8, 16]], [[8, 16]], -1, 0, example)


def test_writing_ends_with_the_line_or_the_end_token_or_after_50_tokens(tmp_path):
    """`~` is a new line here, and `_` a space.  Longer prompts first, so that the order of lengths is another."""
    lm, tokenizer, made = chained(*WRITTEN), bytewise(tmp_path), []
    prompts = [to_write([0, *[13] * (9 - i), PIECES.index(chain[0])]) for i, chain in enumerate(WRITTEN)]
    generate = lm.generate
    lm.generate = lambda *given: made.append(generate(*given)) or made[-1]
    for size in (1, 4, 6):
        found = write(lm, prompts, tokenizer, 2, size)
        assert [p.text for p in found] == [text for text, _ in WRITTEN.values()]
        assert [(p.golds, p.group) for p in found] == [(e.example.golds, e.example.group) for e in prompts]
    assert [made[5 - i].shape[1] - (11 - i) for i in range(6)] == [count for _, count in WRITTEN.values()]


def test_texts_written_together_are_those_written_alone(tmp_path):
    """In batches of the size that is given, or of as many as have room for their keys and values."""
    random_oracle(tiny_llama(**SPECIAL), tmp_path)
    lm, tokenizer, generator = load(tmp_path), bytewise(tmp_path), torch.Generator().manual_seed(0)
    prompts = [to_write(torch.randint(3, 20, (n,), generator=generator).tolist()) for n in (7, 2, 12, 1, 5, 5, 9)]
    alone = [write(lm, [prompt], tokenizer, 2, 1)[0] for prompt in prompts]
    assert len({p.text for p in alone}) > 3 and len({len(p.text) for p in alone}) > 2
    assert write(lm, prompts, tokenizer, 2, 3) == write(lm, prompts, tokenizer, 2, 7) == alone
    calls, generate = [], lm.generate
    lm.generate = lambda tokens, *rest: calls.append(len(tokens)) or generate(tokens, *rest)
    assert lm.cache_bytes == 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, width, float32
    assert write(lm, prompts, tokenizer, 2, 1, cache_bytes=5 * (50 + 12) * lm.cache_bytes) == alone and calls == [5, 2]


@pytest.mark.full
def test_real_texts_written_together_are_those_of_transformers_alone(zollama):
    lm, oracle, tokenizer = zollama
    prompts = encode_all("squad", QUESTIONS, tokenizer, lm.config)
    for e, text in zip(prompts, [p.text for p in write(lm, prompts, tokenizer, 0, 3)], strict=True):
        prompt = torch.tensor([e.sequences[0][: -len(e.answers[0])]])
        new = oracle.generate(prompt, max_new_tokens=50, do_sample=False, pad_token_id=2)[0, prompt.shape[1] :]
        assert text == tokenizer.decode(new.tolist()).partition("\n")[0].strip() != ""


def test_what_fills_up_a_row_that_ended_is_no_text(tmp_path):
    lm = chained("5 e </s>", "x x", pad_token_id=13)  # which spells x, as sentencepiece spells <unk>
    found = write(lm, [to_write([0, 7]), to_write([0, 13])], bytewise(tmp_path), 13, 2)
    assert [p.text for p in found] == ["e", "x" * 50]


def test_pieces_that_end_a_line(tmp_path, real_model):
    assert bytewise(tmp_path).line_ends == [16, 17, 18, 19]
    assert wordwise(tmp_path, ["<unk>", "a", "\n", "a\nb", "n"]).line_ends == [2, 3]
    assert Tokenizer(real_model("zollama-28m")).line_ends == [13]
    assert wordwise(tmp_path, ["<unk>", "\u010aensu"]).line_ends == []  # a letter of Maltese


# ---------------------------------------------------------------- encoding

TEXT = [f"w{i}" for i in range(80)]
WORDS = ["<s>", "</s>", "<pad>", *"<mask> <unk> ? , Yes No Title: Context: Question: Answer: Who won".split(), *TEXT]


def word_ids(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def encoder(directory, name: str, limit: int, masked: bool = False) -> Encoder:
    special = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2, longest=512, vocab_size=len(WORDS))
    return Encoder(wordwise(directory, WORDS), TASKS[name], SimpleNamespace(**special, masked=masked), limit)


def question(passage: list[str], answer: str = "w79 w78") -> Row:
    return Row("f:1", {"title": "w0", "context": " ".join(passage), "question": "Who won ?", "answers": [answer]})


def test_a_long_passage_loses_its_left_and_the_first_of_two_sentences_its_end(tmp_path):
    """Of 90 tokens 50 are kept to write in, or 60 for an answer of so many.  RTE's premise ends before its period."""
    encode, end = encoder(tmp_path, "squad", 90), "Question: Who won ? Answer: "
    short = encode(question(TEXT[:5]))
    assert short.sequences == [word_ids(f"<s> Title: w0 Context: w0 w1 w2 w3 w4 {end} w79 w78")] and short.cut == 0
    for answer, kept in (("w79 w78", 40 - 6), (" ".join(TEXT[:60]), 30 - 6)):  # all but <s> and the question's five
        e = encode(question(TEXT, answer))
        assert e.sequences == [word_ids(f"<s> {' '.join(TEXT[-kept:])} {end} {answer}")]
        assert e.answers == [word_ids(answer)] and e.cut == 3 + 80 - kept
    row = Row("f:1", {"premise": " ".join(TEXT[:9]) + " .", "hypothesis": "w70 w71", "label": "entailment"})
    e = encoder(tmp_path, "rte", 12, masked=True)(row)
    assert e.sequences == [word_ids("<s> w0 w1 w2 w3 w4 ? <mask> , w70 w71 </s>")] and (e.at, e.cut) == (7, 4)


@pytest.mark.parametrize("name, limit, others, masked", [("squad", 56, 56, False), ("rte", 7, 7, True)])
def test_a_limit_without_room_is_refused_with_the_place(tmp_path, name, limit, others, masked):
    fields = question(TEXT).fields | {"premise": "w1 w2.", "hypothesis": "w70 w71", "label": "entailment"}
    with pytest.raises(ValueError, match=f"^f:1: {limit} tokens leave no room for the text beside {others} others"):
        encoder(tmp_path, name, limit, masked)(Row("f:1", fields))
    assert encoder(tmp_path, name, limit + 1, masked)(Row("f:1", fields)).sequences[0][0] == 0


def test_the_right_option_alone_is_encoded_where_the_loss_is_its_own(real_model):
    tokenizer, config = Tokenizer(real_model("zollama-28m")), SimpleNamespace(longest=99, masked=False, vocab_size=9**5)
    for name, rows in (("copa", CAUSES), ("record", RECORDS), ("sst2", SENTENCES)):
        every, alone = (encode_all(name, rows, tokenizer, config, right_alone=of)[-1] for of in (False, True))
        assert alone == (every if name == "sst2" else Encoded(every.sequences[1:], every.answers[1:], -1, 0))
    whole = encode_all("copa", CAUSES, tokenizer, config)[-1].answers  # all words of a choice, though a space is before
    assert [tokenizer.decode(answer).strip() for answer in whole] == ["I slept.", "many streets got wet."]


# ---------------------------------------------------------------- tasks of one's own

FILES = {"train": "train.jsonl", "test": "test.jsonl"}
OWN = {"prompt": "{text} It was", "options": {"0": " bad", "1": " good"}, "files": FILES}
ROW = Row("f:1", {"text": "Fine", "label": 1, "a": "One", "b": "Two", "answers": ["x y", "z"]})
OF_TEXT = {"options": None, "answer": " {answers}\n", "label": "answers"}
GOOD = [  # changes to OWN, options of ROW, right ones, loss and metric
    ({}, (" bad", " good"), (1,), "options", "accuracy"),
    ({"options": ["{a:lower}", "not {b}"], "loss": "answer"}, ("one", "not Two"), (1,), "answer", "accuracy"),
    ({"options": "answers", "also": ["f1"]}, ("x y", "z"), (1,), "options", "accuracy"),
    (OF_TEXT, (" x y\n",), ("x y", "z"), "answer", "f1"),
]
FEW, NO_FILE = "there must be two options or more", '"files" must name a train and a test file'
NEITHER, ONE_MASK = 'one of "options" and "answer" is needed', "cloze must have one <mask>"
BAD = [
    ({"promt": "{text}"}, "unknown field 'promt'; known: prompt, cloze, options"),
    ({"prompt": "{text:strip|uper}"}, "prompt: unknown filter 'uper'; known: strip, lower, "),
    (OF_TEXT | {"answer": "{answers:x}"}, "answer: unknown filter 'x'"),
    ({"prompt": None}, '"prompt" is missing (for a masked model: "cloze")'),
    ({"prompt": "{text It was"}, "prompt: expected '}' before end of string; a brace of the text itself is written"),
    ({"cloze": "{text}"}, ONE_MASK), ({"cloze": "<mask> {text} <mask>"}, ONE_MASK),
    ({"options": None}, NEITHER), ({"answer": "{text}"}, NEITHER),
    ({"options": {"0": " bad"}}, FEW), ({"options": ["{a}"]}, FEW),
    ({"quoting": "tsv"}, "quoting must be one of 'csv', 'none', got 'tsv'"),
    ({"files": {"train": "a"}}, NO_FILE), ({"files": {"test": "a", "dev": "b"}}, NO_FILE), ({"files": None}, NO_FILE),
    ('{"prompt": ', "Expecting value: line 1 column 12"), ('["prompt"]', "is not a JSON object"),
    ({"passage": "txt"}, "passage"), ({"prompt": 5}, "prompt"), ({"options": 2}, "options"),
]  # fmt: skip


def own(directory, given: dict | str) -> str:
    given = given if isinstance(given, str) else json.dumps({n: v for n, v in (OWN | given).items() if v is not None})
    (directory / "mine.json").write_text(given)
    return str(directory / "mine.json")


@pytest.mark.parametrize("changes, options, golds, loss, metric", GOOD)
def test_a_task_of_ones_own(tmp_path, changes, options, golds, loss, metric):
    task = get_task(own(tmp_path, changes))
    example = task.example(ROW, masked=False)
    assert ("".join(example.pieces), example.options, example.golds) == ("Fine It was", options, golds)
    assert (task.name, task.folder, task.loss, task.metric) == ("mine", tmp_path, loss, metric)


@pytest.mark.parametrize("given, message", BAD)
def test_what_no_task_can_have_is_refused_with_the_file(tmp_path, given, message):
    path = own(tmp_path, given)
    with pytest.raises(ValueError) as refused:
        get_task(path)
    assert str(refused.value).startswith(path) and message in str(refused.value)


def test_splits_of_a_task_of_ones_own(tmp_path):
    """Its files are beside it.  Those of a task with a dev file are read whole; else dev is drawn from train."""
    for name, n in (("train", 12), ("dev", 3), ("test", 5)):
        lines = [json.dumps({"text": f"{name} {i}", "label": i % 2}) for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    task = get_task(own(tmp_path, {"files": FILES | {"dev": "dev.jsonl"}}))
    splits = load_splits(task, None, None, None, None, None, 4)
    found = [[row.fields["text"] for row in rows] for rows in (splits.train, splits.dev, splits.tests["test"])]
    assert found == [[f"{name} {i}" for i in range(n)] for name, n in (("train", 12), ("dev", 3), ("test", 4))]
    splits = load_splits(get_task(own(tmp_path, {})), None, None, 0, 7, 4, 9)
    drawn = [row.fields["text"] for row in (*splits.train, *splits.dev)]
    assert len(splits.train) == 7 and len(set(drawn)) == 11 and all(text.startswith("train") for text in drawn)
