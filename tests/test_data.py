"""Official files, splits, prompts and option scores."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from helpers import tiny_llama, tiny_roberta

from data.scoring import BatchLoss, Encoded, Encoder, collate, evaluate, option_scores
from data.tasks import TASKS, Example, Task, get_task, load_splits, read_examples
from data.tokenizer import Tokenizer
from model import create, load

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


READ = {  # a file is read as it is; a byte order mark is no text, and only line feeds end lines
    "a.tsv": ("\ufeffsentence\tlabel\r\nfine \t1\n\"quoted\" , it 's\t0\none\u2028two\x85three\t1\r\n",
              [("fine", 1), ("\"quoted\" , it 's", 0), ("one\u2028two\x85three", 1)]),
    # label first, no header; quotes are csv's: a comma, a quote, and a sentence that goes on in the next line
    "a.csv": ('4,Where is it ?\n0,"What , ""exactly"" , is it ?"\n3,"one\ntwo"\n',
              [("Where is it ?", 4), ('What , "exactly" , is it ?', 0), ("one\ntwo", 3)]),
}  # fmt: skip
REFUSED = [
    ("a.tsv", "text\tlabel\na\t1\n", "['text', 'label']"),
    ("a.tsv", "sentence\tlabel\na\t6\n", ":2: the label must be one of 0 to 5, got '6'"),
    ("a.tsv", "sentence\tlabel\na\t1\nb\tpositive\n", ":3: the label must be one of 0 to 5, got 'positive'"),
    ("a.tsv", "sentence\tlabel\na\n", ":2: expected 2 columns, got 1"),
    ("a.tsv", "sentence\tlabel\na\tb\t1\n", ":2: expected 2 columns, got 3"),
    ("a.tsv", "sentence\tlabel\n", "no examples"),
    ("a.tsv", "", "got ['']"),
    ("a.csv", "6,What\n", ":1: the label must be one of 0 to 5, got '6'"),
    ("a.csv", "1,a\n1\n", ":2: expected label"),
    ("a.csv", "1,a,b\n", "got 3 columns"),
    ("a.csv", "", "no examples"),
]


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_as_it_is(tmp_path, name):
    text, expected = READ[name]
    assert read_examples(write(tmp_path / name, text), 6) == expected


def test_a_wrong_file_is_refused_with_its_line(tmp_path):
    for name, text, message in REFUSED:
        with pytest.raises(ValueError) as refused:
            read_examples(write(tmp_path / name, text), 6)
        assert message in str(refused.value) and str(tmp_path) in str(refused.value)
    (tmp_path / "a.tsv").write_bytes(b"\xff\xfe\x00")
    for name, message in (("a.tsv", "UTF-8"), ("b.tsv", "missing")):
        with pytest.raises(ValueError, match=message):
            read_examples(tmp_path / name, 2)
    with pytest.raises(ValueError, match="'sst3'.*sst2"):
        get_task("sst3")


def test_large_model_splits_are_mezos_draw(tmp_path):
    rows = [f"s{i}\t{i % 2}" for i in range(50)]
    write(tmp_path / "SST-2" / "train.tsv", "\n".join(["sentence\tlabel", *rows]) + "\n")
    write(tmp_path / "SST-2" / "dev.tsv", "\n".join(["sentence\tlabel", *rows[:9]]) + "\n")
    splits = load_splits(SST2, str(tmp_path), 0, 7, num_train=20, num_dev=10, num_eval=5)
    order = np.random.RandomState(7).permutation(50)
    assert [e.sentence for e in splits.train] == [f"s{i}" for i in order[:20]]
    assert [e.sentence for e in splits.dev] == [f"s{i}" for i in order[20:30]]
    assert [e.sentence for e in splits.test] == [f"s{i}" for i in np.random.RandomState(7).permutation(9)[:5]]
    with pytest.raises(ValueError, match="holds 50 examples, fewer than 45 train"):
        load_splits(SST2, str(tmp_path), 0, 7, num_train=45, num_dev=10, num_eval=5)


def test_real_k_shot_files_have_k_examples_a_class(real_data):
    """But for TREC's smallest class, abbreviations, which has fewer than 512 questions."""
    root = str(real_data("k-shot").parent)
    for k, seed in ((16, 13), (512, 42)):
        splits = load_splits(SST2, root, k, seed, 0, 0, num_eval=1000)
        assert [sum(e.label == c for e in split) for split in splits[:2] for c in (0, 1)] == [k] * 4
        assert len(splits.test) == 872
    splits = load_splits(get_task("trec"), root, 512, 42, 0, 0, num_eval=1000)
    assert [sum(e.label == c for e in splits.train) for c in range(6)] == [512, 512, 86, 512, 512, 512]
    assert len(splits.test) == 500 and Example("Where is Basque country located ?", 4) in splits.train


# ---------------------------------------------------------------- encoding


def task(*options: str, mask_first: bool = False) -> Task:
    return Task("t", "", " It was", options, mask_first=mask_first)


def test_a_prompt_becomes_one_sequence_read_at_its_end(words):
    e = Encoder(words, SST2, config(), 64)(Example("not dull", 1))
    assert e == Encoded([ids("<s> not dull It was")], [ids("terrible"), ids("great")], 4, 1)


def test_options_of_several_tokens_get_a_sequence_each(words):
    """Each keeps the same prompt, also where that is cut."""
    e = Encoder(words, task(" not great", " great"), config(), 64)(Example("fun", 0))
    assert e.sequences == [ids("<s> fun It was not great"), ids("<s> fun It was great")]
    assert e.answers == [ids("not great"), ids("great")]
    e = Encoder(words, task(" not very great", " dull"), config(), 8)(Example("fun " * 20, 0))
    assert e.sequences == [ids("<s> fun fun It was not very great"), ids("<s> fun fun It was dull")]


def test_a_long_prompt_loses_its_beginning_but_not_the_begin_token(words):
    e = Encoder(words, SST2, config(), 16)(Example("dull " * 30, 0))
    assert e.sequences[0] == ids("<s> " + "dull " * 12 + "It was") and e.at == 14  # the option is the 16th token


def test_a_cloze_text_is_read_at_the_mask_and_cut_to_length(words):
    """13 positions, of which the padding index 2 takes three: 10 tokens.  The mask may come first, as in LM-BFF's TREC;
    its text has `:`, which is no word here."""
    encode = Encoder(words, SST2, config(masked=True, positions=13), 64)
    assert encode(Example("fun", 0)).sequences == [ids("<s> fun It was <mask> . </s>")]
    e = encode(Example("dull " * 30, 0))
    assert e.sequences == [ids("<s> dull dull dull dull It was <mask> . </s>")]
    assert e.sequences[0][e.at] == ids("<mask>")[0]
    encode = Encoder(words, task(" dull", " great", mask_first=True), config(masked=True, positions=13), 64)
    assert encode(Example("fun", 1)) == Encoded([ids("<s> <mask> <unk> fun </s>")], [ids("dull"), ids("great")], 1, 1)
    assert encode(Example("dull " * 30, 0)).sequences == [ids("<s> <mask> <unk>" + " dull" * 6 + " </s>")]


def test_a_task_that_does_not_fit_the_tokenizer_is_refused(words):
    with pytest.raises(ValueError, match="' very fun'.*one token.*got 2"):
        Encoder(words, task(" very fun", " dull"), config(masked=True), 64)
    for masked in (False, True):
        with pytest.raises(ValueError, match="tell the options apart.*awful"):
            Encoder(words, task(" awful", " superb"), config(masked), 64)(Example("fun", 0))
    small = config()
    small.vocab_size = 10
    with pytest.raises(ValueError, match="token id 10 is outside the model's vocabulary of 10"):
        Encoder(words, SST2, small, 64)(Example("fun", 0))


@pytest.mark.parametrize(("masked", "limit"), [(False, 2), (True, 6)])
def test_a_limit_without_room_for_any_text_is_refused(words, masked, limit):
    with pytest.raises(ValueError, match=f"{limit} tokens leave no room"):
        Encoder(words, SST2, config(masked), limit)(Example("fun", 0))
    encode = Encoder(words, SST2, config(masked), limit + 1)
    assert len(encode(Example("fun dull", 0)).sequences[0]) <= limit + 1


# ---------------------------------------------------------------- scores
# Where two ways are compared, float32 rounding of sums and of a log-softmax is what is left: 1e-5.


def lm_and_examples(words, share: bool = True, masked: bool = False):
    special = dict(vocab_size=len(PIECES), bos_token_id=0, eos_token_id=1, pad_token_id=2)
    lm = create((tiny_roberta if masked else tiny_llama)(**special), seed=3)
    for stored in lm.weights.values():
        if stored.value.ndim == 2:
            stored.value.mul_(10)  # or every score would be near 0
    encode = Encoder(words, SST2, lm.config, 64, share=share)
    return lm, [encode(Example(s, i % 2)) for i, s in enumerate(("fun", "not very dull", "dull . very fun ."))]


def softmaxes(lm, encoded, tokens: int = 0):
    batch = collate(encoded, 2, torch.device("cpu"), tokens)
    return option_scores(lm, batch, lm.stored_view())[0].softmax(-1)


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
def test_an_example_scores_alike_whatever_it_is_batched_with(words, masked, share):
    """Nor does padding beyond the longest change a score, to a length that steps of other lengths have too."""
    lm, encoded = lm_and_examples(words, share, masked)
    near(softmaxes(lm, encoded), torch.cat([softmaxes(lm, [e]) for e in encoded]))
    assert collate(encoded, 2, torch.device("cpu"), tokens=24).tokens.shape == (3, 24)
    near(softmaxes(lm, encoded, tokens=24), softmaxes(lm, encoded))


OPTIONS = {"apart": (" not great", " dull"), "alike": (" not great", " not dull", " not"),
           "one token": (" great", " dull")}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scores_are_log_probabilities_of_the_answer_tokens(words, options):
    """By hand: log-softmax of the full logits at the position before each token, mean over the option's tokens.  Each
    option has a forward of its own there; here all options of all examples share one, and their prompts."""
    lm, _ = lm_and_examples(words)
    encode = Encoder(words, task(*options), lm.config, 64, share=False)
    encoded = [encode(Example(sentence, 0)) for sentence in ("fun", "dull . very fun .", "very dull")]
    batch = collate(encoded, pad=2, device=torch.device("cpu"))
    assert batch.tokens.numel() < sum(len(s) for e in encoded for s in e.sequences)
    for e, scores in zip(encoded, option_scores(lm, batch, lm.stored_view())[0], strict=True):
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
    assert quality.accuracy == pytest.approx((p.argmax(-1) == labels).float().mean().item())
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
    test = load_splits(SST2, str(real_data("k-shot").parent), 512, 42, 0, 0, 1000).test
    quality = evaluate(lm, [encode(e) for e in test], lm.config.pad_token_id or 0, batch_size=128)
    assert 100 * quality.accuracy == pytest.approx(zero_shot, abs=0.06)
