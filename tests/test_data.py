"""Official files, splits, prompts and option scores."""

from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from helpers import review, tiny_llama, tiny_roberta
from hypothesis import given
from hypothesis import strategies as st

from data import files, scoring
from data.files import load_splits, read_rows
from data.metrics import measure
from data.scoring import NARROWEST, BatchLoss, Encoded, Encoder, collate, evaluate, option_scores, rows_of
from data.tasks import TASKS, Row, Task, get_task
from data.tokenizer import Tokenizer
from model import create, load
from runtime.config import max_length, parse
from runtime.model_configs import read_config

SST2 = TASKS["sst2"]
PIECES = "<s> </s> <pad> <mask> <unk> It was great terrible dull fun not very .".split()


@pytest.fixture
def words(tmp_path) -> Tokenizer:
    """One token a word, so that every expected id can be read off PIECES."""
    spelled = tokenizers.Tokenizer(tokenizers.models.WordLevel({p: i for i, p in enumerate(PIECES)}, unk_token="<unk>"))
    spelled.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    spelled.save(str(tmp_path / "tokenizer.json"))
    return Tokenizer(tmp_path)


def ids(text: str) -> list[int]:
    return [PIECES.index(piece) for piece in text.split()]


def config(masked: bool = False, positions: int = 64):
    special = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2, longest=positions - 3 * masked)
    return SimpleNamespace(**special, masked=masked, vocab_size=len(PIECES))


# ---------------------------------------------------------------- files


def write(path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


CLASSES = {str(i): f" {i}" for i in range(6)}
TABLE = Task("t", "{sentence} It was", options=CLASSES)
HEADLESS = Task("t", "{sentence} It was", options=CLASSES, columns=("label", "sentence"))
READ = {  # a file is read as it is; a byte order mark is no text, and only line feeds end lines
    "a.tsv": (TABLE, "\ufeffsentence\tlabel\r\nfine \t1\n\"quoted\" , it 's\t0\none\u2028two\x85three\t1\r\n\n",
              [("fine ", "1"), ("\"quoted\" , it 's", "0"), ("one\u2028two\x85three", "1")]),
    # label first, no header; quotes are csv's: a comma, a quote, and a sentence that goes on in the next line
    "a.csv": (HEADLESS, '4,Where is it ?\n0,"What , ""exactly"" , is it ?"\n3,"one\ntwo"\n\n',
              [("Where is it ?", "4"), ('What , "exactly" , is it ?', "0"), ("one\ntwo", "3")]),
    "b.csv": (TABLE, f"sentence,idx,label\r\n{'long ' * 40000},0,5\r\n", [("long " * 40000, "5")]),
    "a.jsonl": (TABLE, '{"sentence": "fine", "label": 1, "idx": 0}\n\n{"label": 0, "sentence": "é\\n"}',
                [("fine", 1), ("é\n", 0)]),
}  # fmt: skip
REFUSED = [
    ("a.tsv", TABLE, "text\tlabel\na\t1\n", ":2: there is no field 'sentence'; there are: 'text', 'label'"),
    ("a.tsv", TABLE, "sentence\tlabel\na\t6\n", ":2: the label must be one of '0', '1', '2', '3', '4', '5', got '6'"),
    ("a.tsv", TABLE, "sentence\tlabel\na\t1\nb\tpositive\n", ":3: the label must be one of '0'"),
    ("a.tsv", TABLE, "sentence\tlabel\na\n", ":2: expected 2 columns (sentence, label), got 1"),
    ("a.tsv", TABLE, "sentence\tlabel\na\tb\t1\n", ":2: expected 2 columns (sentence, label), got 3"),
    ("a.tsv", TABLE, "sentence\tsentence\n", "two columns have the same name"),
    ("a.tsv", TABLE, "sentence\tlabel\n", "no examples"),
    ("a.tsv", TABLE, "", "no examples"),
    ("a.tsv", TABLE, 'sentence\tlabel\n"a b"\t1\n"c"\t0\n', 'every text is in quotes; read it with "quoting": "csv"'),
    ("a.csv", HEADLESS, "6,What\n", ":1: the label must be one of"),
    ("a.csv", HEADLESS, "1,a\n1\n", ":2: expected 2 columns (label, sentence), got 1"),
    ("a.csv", HEADLESS, "1,a,b\n", "got 3"),
    ("a.csv", HEADLESS, '1,a\n2,"open\n3,c\n4,"d"\n', ":2: a quote that begins here does not end well"),
    ("a.csv", HEADLESS, '1,a\n2,"open\n3,c\n', ":2: a quote that begins here does not end well"),
    ("a.jsonl", TABLE, '{"sentence": "a", "label": 1}\n{"sentence": \n', ":2: not JSON"),
    ("a.jsonl", TABLE, "[1]\n", ":1: expected an object, got '[1]'"),
    ("a.jsonl", TABLE, '{"sentence": "a"}\n', ":1: there is no field 'label'; there are: 'sentence'"),
    ("a.jsonl", TABLE, '{"sentence": "' + "a" * 2**20 + 'a", "label": 1}\n', ":1: 'sentence' has 1,048,577 characters"),
    ("a.txt", TABLE, "a", "end in .jsonl, .csv or .tsv"),
]


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_as_it_is(tmp_path, name):
    task, text, expected = READ[name]
    rows = read_rows(write(tmp_path / name, text), task)
    assert [(row.fields["sentence"], row.fields["label"]) for row in rows] == expected


@pytest.mark.parametrize("name, task, text, message", REFUSED)
def test_a_wrong_file_is_refused_with_its_line(tmp_path, name, task, text, message):
    with pytest.raises(ValueError) as refused:
        [task.example(row, masked=False) for row in read_rows(write(tmp_path / name, text), task)]
    assert message in str(refused.value) and str(tmp_path) in str(refused.value)


def test_what_is_no_file_of_text_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.tsv").write_bytes(b"\xff\xfe\x00")
    for name, message in (("a.tsv", "UTF-8"), ("b.tsv", "missing")):
        with pytest.raises(ValueError, match=message):
            read_rows(tmp_path / name, TABLE)
    with pytest.raises(ValueError, match="'sst3'.*sst2"):
        get_task("sst3")
    monkeypatch.setattr(files, "LARGEST_FILE", 2)
    with pytest.raises(ValueError, match="GB; at most"):
        read_rows(tmp_path / "a.tsv", TABLE)


def test_large_model_splits_are_mezos_draw(tmp_path):
    rows = [f"s{i}\t{i % 2}" for i in range(50)]
    write(tmp_path / "SST-2" / "train.tsv", "\n".join(["sentence\tlabel", *rows]) + "\n")
    write(tmp_path / "SST-2" / "dev.tsv", "\n".join(["sentence\tlabel", *rows[:9]]) + "\n")
    splits = load_splits(SST2, str(tmp_path), 0, 7, num_train=20, num_dev=10, num_eval=5)
    order = np.random.RandomState(7).permutation(50)
    sentences = [[row.fields["sentence"] for row in rows] for rows in (splits.train, splits.dev, splits.tests["test"])]
    drawn = order[:20], order[20:30], np.random.RandomState(7).permutation(9)[:5]
    assert sentences == [[f"s{i}" for i in at] for at in drawn]
    assert len(load_splits(SST2, str(tmp_path), 0, 7, num_train=45, num_dev=10, num_eval=5).train) == 40
    with pytest.raises(ValueError, match="holds 50 examples: 50 for dev leave none"):
        load_splits(SST2, str(tmp_path), 0, 7, num_train=1, num_dev=50, num_eval=5)


def labels_of(rows, task, masked: bool = True) -> list[int]:
    """How many rows have each label."""
    found = Counter(task.example(row, masked).label for row in rows)
    return [found[label] for label in range(len(task.options))]


def test_real_k_shot_files_have_k_examples_a_class(real_data):
    """But for TREC's smallest class, abbreviations, which has fewer than 512 questions, and what its dev has left."""
    root, sizes = str(real_data("k-shot").parent), {}
    for name in ("sst2", "sst5", "snli", "mnli", "rte", "trec"):
        for k, seed in ((16, 13), (512, 42)):
            splits, task = load_splits(TASKS[name], root, k, seed, None, None, num_eval=1000), TASKS[name]
            if (name, k) != ("trec", 512):
                assert labels_of(splits.train, task) == labels_of(splits.dev, task) == [k] * len(task.options)
        sizes[name] = {split: len(rows) for split, rows in splits.tests.items()}
    assert labels_of(splits.train, TASKS["trec"]) == [512, 512, 86, 512, 512, 512]
    assert "Where is Basque country located ?" in [row.fields["sentence"] for row in splits.train]
    assert sizes == {"sst2": {"test": 872}, "sst5": {"test": 1000}, "snli": {"test": 1000}, "rte": {"test": 277},
                     "mnli": {"test": 1000, "test_mismatched": 1000}, "trec": {"test": 500}}  # fmt: skip
    with pytest.raises(ValueError, match="17-13 is missing; there are 16-100, 16-13, .*512-87"):
        load_splits(TASKS["sst5"], root, 17, 13, None, None, 1000)


FULL = {  # rows of train and test, and how many have each label in train; None where options are an example's own
    "sst2": (67349, 872, [29780, 37569]), "rte": (2490, 277, [1249, 1241]), "cb": (250, 56, [115, 119, 16]),
    "boolq": (2270, 1000, [1420, 850]), "wsc": (554, 104, [295, 259]), "wic": (5428, 638, [2714, 2714]),
    "multirc": (27243, 4848, [15218, 12025]), "copa": (400, 100, [195, 205]), "record": (11, 11, None),
    "squad": (11877, 10570, None), "drop": (8881, 655, None),
}  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("name", FULL)
def test_real_official_files_are_read_whole(name, real_data):
    task, root, (train, test, labels) = TASKS[name], real_data("k-shot").parent, FULL[name]
    rows = {split: read_rows(root / path, task) for split, path in task.files.items()}
    examples = {split: [task.example(row, masked=False) for row in found] for split, found in rows.items()}
    assert {split: len(found) for split, found in examples.items()} == {"train": train, "test": test}
    assert labels is None or labels_of(rows["train"], task, masked=False) == labels
    assert all(e.golds and e.options and "".join(e.pieces).strip() for found in examples.values() for e in found)


@pytest.mark.full
@pytest.mark.parametrize("name", ["sst5", "snli", "mnli", "trec"])
def test_real_few_shot_files_of_pairs_and_tables_can_be_cut(name, real_data, tmp_path):
    """Of LM-BFF's other full files there is none here: its 512 examples a class stand for them, in the same layout."""
    task, root = TASKS[name], real_data("k-shot").parent
    for split, path in task.files.items():
        place = tmp_path / path
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(root / task.k_shot[split].format(k=512, seed=42))
    splits = load_splits(task, tmp_path, 16, 13, None, None, num_eval=200)
    assert labels_of(splits.train, task) == labels_of(splits.dev, task) == [16] * len(task.options)
    assert {split: len(rows) for split, rows in splits.tests.items()} == dict.fromkeys(set(task.files) - {"train"}, 200)


@pytest.mark.full
@pytest.mark.parametrize("k, seed", [(16, 13), (16, 100), (512, 42), (512, 87)])
def test_real_few_shot_files_can_be_cut_from_the_full_one(k, seed, real_data, tmp_path):
    """LM-BFF's rule gives the published splits, in their order, where only the full files are there."""
    root = real_data("SST-2").parent
    (tmp_path / "SST-2").symlink_to(root / "SST-2")
    cut, published = (load_splits(SST2, str(folder), k, seed, None, None, 1000) for folder in (tmp_path, root))
    for ours, theirs in (cut.train, published.train), (cut.dev, published.dev):
        assert [row.fields for row in ours] == [row.fields for row in theirs] and len(ours) == 2 * k


# ---------------------------------------------------------------- prompts, by hand from the papers' templates

RECORD = {"passage": "Mariam shot him.\n@highlight\nNuria waits.\n@highlight\nIt is long",
          "choices": [" Mariam has refused.", " Nuria has refused."], "label": [1], "entities": ["Mariam", "Nuria"]}
QUESTION = {"title": "Super_Bowl_50", "context": "Denver won.", "question": " Who won? ",
            "answers": ["Denver", "the Broncos"]}  # fmt: skip
PROMPTS = {  # task: (fields, prompt, options or the answer, label)
    "sst2": ({"sentence": "fine ", "label": "1"}, "fine It was", [" terrible", " great"], 1),
    "rte": ({"premise": "It rains.", "hypothesis": "It is wet.", "label": "not_entailment"},
            'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n', ["Yes", "No"], 1),
    "cb": ({"premise": "It rains.", "hypothesis": "it is wet", "label": "neutral"},
           'Suppose It rains. Can we infer that "it is wet"? Yes, No, or Maybe?\n', ["Yes", "No", "Maybe"], 2),
    "boolq": ({"passage": "Tax -- a levy.", "question": "is a tax a levy", "label": True},
              "Tax -- a levy. Is a tax a levy?\n", ["Yes", "No"], 0),
    "wsc": ({"text": "Mark told Pete. He lied.", "target": {"span1_text": "Mark", "span2_text": "He"}, "label": False},
            'Mark told Pete. He lied.\nIn the previous sentence, does the pronoun "he" refer to Mark? Yes or No?\n',
            ["No", "Yes"], 0),
    "wic": ({"word": "place", "sentence1": "My place.", "sentence2": "No place.", "label": True},
            'Does the word "place" have the same meaning in these two sentences? Yes, No?\nMy place.\nNo place.\n',
            ["No", "Yes"], 1),
    "multirc": ({"paragraph": "A b.", "question": "Who?", "answer": "b", "label": 1, "group": "0, 1"},
                'A b.\nQuestion: Who?\nI found this answer "b". Is that correct? Yes or No?\n', ["No", "Yes"], 1),
    "copa": ({"premise": "My body cast a shadow.", "choice1": "The sun rose.", "choice2": "I sat.", "question": "cause",
              "label": 0}, "My body cast a shadow because ", ["the sun rose.", "I sat."], 0),
    "record": (RECORD, "Mariam shot him.\n- Nuria waits.\n- It is long\n-", RECORD["choices"], 1),
    "squad": (QUESTION, "Title: Super_Bowl_50\nContext: Denver won.\nQuestion: Who won?\nAnswer:", [" Denver\n"], 0),
    "drop": (QUESTION, "Passage: Denver won.\nQuestion: Who won?\nAnswer:", [" Denver\n"], 0),
}  # fmt: skip
CLOZES = {
    "sst2": ({"sentence": "fine", "label": "0"}, "fine It was<mask>."),
    "sst5": ({"sentence": "fine", "label": "4"}, "fine It was<mask>."),
    "rte": ({"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment"}, "It rains?<mask>, it is wet."),
    "snli": ({"sentence1": "It rains.", "sentence2": "It is wet.", "gold_label": "neutral"},
             "It rains?<mask>, it is wet."),
    "mnli": ({"sentence1": "It rains.", "sentence2": "It is wet.", "gold_label": "neutral"},
             "It rains?<mask>, it is wet."),
    "trec": ({"sentence": "Who?", "label": "3"}, "<mask>: Who?"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_the_papers_character_for_character(name):
    fields, prompt, options, label = PROMPTS[name]
    example = TASKS[name].example(Row("here", fields), masked=False)
    assert "".join(example.pieces) == prompt and list(example.options) == options and example.label == label
    assert example.golds == (tuple(QUESTION["answers"]) if TASKS[name].generates else (label,))


@pytest.mark.parametrize("name", CLOZES)
def test_a_cloze_text_is_the_papers(name):
    fields, text = CLOZES[name]
    assert "".join(TASKS[name].example(Row("here", fields), masked=True).pieces) == text


# ---------------------------------------------------------------- encoding


def task(*options: str, cloze: str = "{sentence} It was<mask>.") -> Task:
    return Task("t", "{sentence} It was", cloze, {str(i): option for i, option in enumerate(options)})


def test_a_prompt_becomes_one_sequence_read_at_its_end(words):
    e = Encoder(words, SST2, config(), 64)(review("not dull", 1))
    assert e == Encoded([ids("<s> not dull It was")], [ids("terrible"), ids("great")], 4, 1)


def test_options_of_several_tokens_get_a_sequence_each(words):
    """Each keeps the same prompt, also where that is cut."""
    e = Encoder(words, task(" not great", " great"), config(), 64)(review("fun", 0))
    assert e.sequences == [ids("<s> fun It was not great"), ids("<s> fun It was great")]
    assert e.answers == [ids("not great"), ids("great")]
    e = Encoder(words, task(" not very great", " dull"), config(), 8)(review("fun " * 20, 0))
    assert e.sequences == [ids("<s> fun fun It was not very great"), ids("<s> fun fun It was dull")]


def test_a_long_prompt_loses_its_beginning_but_not_the_begin_token(words):
    e = Encoder(words, SST2, config(), 16)(review("dull " * 30, 0))
    assert e.sequences[0] == ids("<s> " + "dull " * 12 + "It was") and e.at == 14  # the option is the 16th token


def test_a_cloze_text_is_read_at_the_mask_and_cut_to_length(words):
    """13 positions, of which the padding index 2 takes three: 10 tokens.  The mask may come first, as in LM-BFF's TREC;
    its text has `:`, which is no word here."""
    encode = Encoder(words, SST2, config(masked=True, positions=13), 64)
    assert encode(review("fun", 0)).sequences == [ids("<s> fun It was <mask> . </s>")]
    e = encode(review("dull " * 30, 0))
    assert e.sequences == [ids("<s> dull dull dull dull It was <mask> . </s>")]
    assert e.sequences[0][e.at] == ids("<mask>")[0]
    encode = Encoder(words, task(" dull", " great", cloze="<mask>: {sentence}"), config(masked=True, positions=13), 64)
    assert encode(review("fun", 1)) == Encoded([ids("<s> <mask> <unk> fun </s>")], [ids("dull"), ids("great")], 1, 1)
    assert encode(review("dull " * 30, 0)).sequences == [ids("<s> <mask> <unk>" + " dull" * 6 + " </s>")]


def test_a_task_that_does_not_fit_the_tokenizer_is_refused(words):
    with pytest.raises(ValueError, match="' very fun'.*one token.*got 2"):
        Encoder(words, task(" very fun", " dull"), config(masked=True), 64)(review("fun", 0))
    for masked in (False, True):
        with pytest.raises(ValueError, match="tell the options apart.*awful"):
            Encoder(words, task(" awful", " superb"), config(masked), 64)(review("fun", 0))
    of_their_own = Task("own", cloze="<mask>: {sentence}", options=(" {a}", " dull"))
    rows = [Row(f"file:{at}", {"sentence": "fun", "a": a, "label": 0}) for at, a in enumerate(("great", "awful"), 2)]
    encode = Encoder(words, of_their_own, config(masked=True), 64)
    encode.all(rows[:1])
    with pytest.raises(ValueError, match="file:3: of a masked model all examples have the same options, .*awful"):
        encode.all(rows)
    small = config()
    small.vocab_size = 10
    with pytest.raises(ValueError, match="token id 10 is outside the model's vocabulary of 10"):
        Encoder(words, SST2, small, 64)(review("fun", 0))


@pytest.mark.parametrize(("masked", "limit"), [(False, 4), (True, 6)])
def test_a_limit_without_room_for_any_text_is_refused(words, masked, limit):
    with pytest.raises(ValueError, match=f"{limit} tokens leave no room"):
        Encoder(words, SST2, config(masked), limit)(review("fun", 0))
    encode = Encoder(words, SST2, config(masked), limit + 1)
    assert len(encode(review("fun dull", 0)).sequences[0]) <= limit + 1


# ---------------------------------------------------------------- scores
# Where two ways are compared, float32 rounding of sums and of a log-softmax is what is left: 1e-5.


def lm_and_examples(words, share: bool = True, masked: bool = False):
    special = dict(vocab_size=len(PIECES), bos_token_id=0, eos_token_id=1, pad_token_id=2)
    lm = create((tiny_roberta if masked else tiny_llama)(**special), seed=3)
    for stored in lm.weights.values():
        if stored.value.ndim == 2:
            stored.value.mul_(10)  # or every score would be near 0
    encode = Encoder(words, SST2, lm.config, 64, share=share)
    return lm, [encode(review(s, i % 2)) for i, s in enumerate(("fun", "not very dull", "dull . very fun ."))]


def softmaxes(lm, encoded, tokens: int = 0):
    batch = collate(encoded, 2, torch.device("cpu"), tokens)
    return option_scores(lm, batch, lm.stored_view())[0][0].softmax(-1)


near = partial(torch.testing.assert_close, atol=1e-5, rtol=0)


def test_scores_from_one_forward_equal_those_of_each_option_run_alone(words):
    """The normaliser over the vocabulary cancels.  Also in a batch that mixes both kinds."""
    lm, shared = lm_and_examples(words)
    _, apart = lm_and_examples(words, share=False)
    assert len(shared[0].sequences) == 1 and len(apart[0].sequences) == 2
    assert softmaxes(lm, shared).std() > 0.05
    near(softmaxes(lm, apart), softmaxes(lm, shared))
    near(softmaxes(lm, [shared[0], *apart[1:]]), softmaxes(lm, shared))


@pytest.mark.parametrize("masked, share", [(False, True), (False, False), (True, True)])
def test_an_example_scores_alike_whatever_it_is_batched_with(words, masked, share, monkeypatch):
    """Nor do other texts in its row change a score, nor padding beyond the longest, to a length that steps of other
    lengths have too."""
    monkeypatch.setattr(scoring, "SHORT", 0)
    lm, encoded = lm_and_examples(words, share, masked)
    alone = torch.cat([softmaxes(lm, [e]) for e in encoded])
    near(softmaxes(lm, encoded), alone)
    rows = [len(collate(encoded[:n], 2, torch.device("cpu"), tokens=24).tokens) for n in (1, 3)]
    assert rows == [1, 1]
    monkeypatch.setattr(scoring, "LEAST_SAVED", 1.0)  # a row each
    assert collate(encoded, 2, torch.device("cpu"), tokens=24).tokens.shape == (3, 24)
    near(softmaxes(lm, encoded, tokens=24), alone)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(0, 40), st.sampled_from([1, 8]))
def test_rows_hold_each_text_once_and_waste_little(lengths, more, multiple):
    longest = -(-(max(lengths) + more) // multiple) * multiple
    rows, T = rows_of(lengths, longest, multiple)
    assert sorted(i for row in rows for i in row) == [*range(len(lengths))] and T % multiple == 0
    assert all(sum(lengths[i] for i in row) <= T for row in rows)
    assert max(longest, NARROWEST) * (1.25 if multiple > 1 else 1) >= T
    padded = len(lengths) * longest
    alone = (rows, T) == ([[i] for i in range(len(lengths))], longest)
    assert alone or len(rows) * T <= 0.9 * padded
    full = [sum(lengths[i] for i in row) for row in rows]
    assert alone or len(rows) < 2 or sum(sorted(full)[:2]) > max(longest, NARROWEST)
    if multiple > 1 and not alone:
        assert T in (64, 80, 96, 112, 128, 160)  # a graph each


OPTIONS = {"apart": (" not great", " dull"), "alike": (" not great", " not dull", " not"),
           "one token": (" great", " dull")}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scores_are_log_probabilities_of_the_answer_tokens(words, options):
    """By hand: log-softmax of the full logits at the position before each token, mean over the option's tokens.  Each
    option has a forward of its own there; here all options of all examples share one, and their prompts."""
    lm, _ = lm_and_examples(words)
    encode = Encoder(words, task(*options), lm.config, 64, share=False)
    encoded = [encode(review(sentence, 0)) for sentence in ("fun", "dull . very fun .", "very dull")]
    batch = collate(encoded, pad=2, device=torch.device("cpu"))
    assert batch.tokens.numel() < sum(len(s) for e in encoded for s in e.sequences)
    for e, scores in zip(encoded, option_scores(lm, batch, lm.stored_view())[0][0], strict=True):
        by_hand = []
        for sequence, answer in zip(e.sequences, e.answers, strict=True):
            log_p = lm(torch.tensor([sequence]))[0].log_softmax(-1)
            start = len(sequence) - len(answer)
            by_hand.append(sum(log_p[start - 1 + j, token] for j, token in enumerate(answer)) / len(answer))
        torch.testing.assert_close(scores, torch.stack(by_hand))


def test_an_option_sees_the_prompt_and_itself_alone():
    """The prompt once, then what each option's tokens need; the last one is only predicted."""
    e = Encoded([[1, 2, 3, 4, 5], [1, 2, 3, 6, 7, 8], [1, 2, 3, 9]], [[4, 5], [6, 7, 8], [9]], -1, 0)
    assert e.branched.tokens == [1, 2, 3, 4, 6, 7] and e.branched.branch == [0, 0, 0, 1, 2, 2]
    assert e.branched.reads == [(2, 4, 0), (3, 5, 0), (2, 6, 1), (4, 7, 1), (5, 8, 1), (2, 9, 2)]


def test_quality_is_the_mean_over_examples_not_over_batches(words):
    """And so is a step's loss, whatever the micro-batches."""
    lm, encoded = lm_and_examples(words)
    p, labels = softmaxes(lm, encoded), torch.tensor([e.label for e in encoded])
    quality = evaluate(lm, encoded, pad=2, batch_size=2)
    right = (p.argmax(-1) == labels).float().mean().item()
    assert measure("accuracy", quality.predictions) == pytest.approx(right)
    assert quality.loss == pytest.approx(-p[range(3), labels].log().mean().item(), abs=1e-5)
    for micro_batch_size in (1, 2, 3):
        loss = BatchLoss.of(lm, encoded, 2, micro_batch_size)(lm.stored_view())
        assert loss.tolist() == pytest.approx([quality.loss], abs=1e-5)


@pytest.mark.full
@pytest.mark.parametrize(("name", "zero_shot"), [("zollama-28m", 52.2), ("zoroberta-26m", 61.6)])
def test_real_zero_shot_accuracy_is_what_transformers_gave(real_model, real_data, name, zero_shot):
    """Measured apart with `transformers` on the same prompts; half an example of 872 is 0.06 points."""
    directory = real_model(name)
    lm = load(directory)
    encode = Encoder(Tokenizer(directory), SST2, lm.config, 128)
    test = load_splits(SST2, str(real_data("k-shot").parent), 512, 42, None, None, 1000).tests["test"]
    answers = evaluate(lm, [encode(e) for e in test], lm.config.pad_token_id or 0, batch_size=128).predictions
    assert 100 * measure("accuracy", answers) == pytest.approx(zero_shot, abs=0.06)


def test_real_cloze_texts_have_lm_bffs_tokens(real_model):
    """Each piece by itself, and the space between two belongs to the later one; at most 256 tokens for RTE."""
    directory = real_model("zoroberta-26m")
    tokenizer, config = Tokenizer(directory), read_config(directory)[0]
    parts = {name: [tokenizer.encode(text) for text in texts] for name, texts in {
        "rte": ("It rains", "?", "<mask>", ",", " the dogs bark."), "trec": ("<mask>", ":", " What is it ?"),
    }.items()}  # fmt: skip
    rows = {"rte": {"premise": "It rains.", "hypothesis": "The dogs bark.", "label": "entailment"},
            "trec": {"sentence": "What is it ?", "label": "1"}}  # fmt: skip
    for name, fields in rows.items():
        encode = Encoder(tokenizer, TASKS[name], config, 256)
        wanted = [token for part in parts[name] for token in part]
        assert encode(Row("here", fields)).sequences == [[*encode.begin, *wanted, *encode.end]]
    limits = [max_length(parse(["--model", str(directory), "--task", name]), True, TASKS[name]) for name in TASKS]
    assert dict(zip(TASKS, limits, strict=True))["rte"] == 256 and sorted(set(limits)) == [128, 256]
