"""Official files, splits, prompts and option scores."""

from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch
from helpers import tiny_llama, tiny_roberta

from data.scoring import Encoded, Encoder, collate, evaluate, losses, option_scores, pack
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


def test_a_file_is_read_as_it_is(tmp_path):
    path = write(tmp_path / "a.tsv", "sentence\tlabel\nfine \t1\n\"quoted\" , it 's\t0\n")
    assert read_examples(path, 2) == [Example("fine", 1), Example("\"quoted\" , it 's", 0)]


def test_a_csv_file_has_the_label_first_and_no_header(tmp_path):
    """Quotes are csv's: a sentence with a comma, a quote in it, and one that goes on in the next line."""
    text = '4,Where is it ?\n0,"What , ""exactly"" , is it ?"\n3,"one\ntwo"\n'
    expected = [Example("Where is it ?", 4), Example('What , "exactly" , is it ?', 0), Example("one\ntwo", 3)]
    assert read_examples(write(tmp_path / "a.csv", text), 6) == expected
    for text, told in [("6,What\n", ":1: the label must be one of 0 to 5, got '6'"), ("1,a\n1\n", ":2: expected label"),
                       ("1,a,b\n", "got 3 columns"), ("", "no examples")]:  # fmt: skip
        with pytest.raises(ValueError) as refused:
            read_examples(write(tmp_path / "a.csv", text), 6)
        assert told in str(refused.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("text\tlabel\na\t1\n", "['text', 'label']"),
        ("sentence\tlabel\na\t2\n", ":2: the label must be one of 0 to 1, got '2'"),
        ("sentence\tlabel\na\t1\nb\tpositive\n", ":3: the label must be one of 0 to 1, got 'positive'"),
        ("sentence\tlabel\na\n", ":2: expected 2 columns, got 1"),
        ("sentence\tlabel\na\tb\t1\n", ":2: expected 2 columns, got 3"),
        ("sentence\tlabel\n", "no examples"),
        ("", "got ['']"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path, text, told):
    with pytest.raises(ValueError) as refused:
        read_examples(write(tmp_path / "a.tsv", text), 2)
    assert told in str(refused.value) and str(tmp_path) in str(refused.value)


def test_only_line_feeds_end_lines_and_a_byte_order_mark_is_no_text(tmp_path):
    path = write(tmp_path / "a.tsv", "\ufeffsentence\tlabel\r\none\u2028two\x85three\t1\r\n")
    assert read_examples(path, 2) == [Example("one\u2028two\x85three", 1)]


def test_a_missing_file_and_bytes_that_are_not_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="missing"):
        read_examples(tmp_path / "a.tsv", 2)
    (tmp_path / "a.tsv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="UTF-8"):
        read_examples(tmp_path / "a.tsv", 2)


def test_an_unknown_task_is_refused_by_name():
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
    for k, seed in ((16, 13), (512, 42)):
        splits = load_splits(SST2, str(real_data("k-shot").parent), k, seed, 0, 0, num_eval=1000)
        assert [sum(e.label == c for e in split) for split in splits[:2] for c in (0, 1)] == [k] * 4
        assert len(splits.test) == 872


def test_real_trec_files(real_data):
    """The smallest class, abbreviations, has fewer than 512 questions."""
    splits = load_splits(get_task("trec"), str(real_data("k-shot").parent), 512, 42, 0, 0, num_eval=1000)
    assert [sum(e.label == c for e in splits.train) for c in range(6)] == [512, 512, 86, 512, 512, 512]
    assert len(splits.test) == 500 and Example("Where is Basque country located ?", 4) in splits.train


# ---------------------------------------------------------------- encoding


def test_a_prompt_becomes_one_sequence_read_at_its_end(words):
    e = Encoder(words, SST2, config(), 64)(Example("not dull", 1))
    assert e == ([ids("<s> not dull It was")], [ids("terrible"), ids("great")], 4, 1)


def test_options_of_several_tokens_get_a_sequence_each(words):
    task = Task("t", "", " It was", (" not great", " great"))
    e = Encoder(words, task, config(), 64)(Example("fun", 0))
    assert e.sequences == [ids("<s> fun It was not great"), ids("<s> fun It was great")]
    assert e.answers == [ids("not great"), ids("great")]


def test_a_long_prompt_loses_its_beginning_but_not_the_begin_token(words):
    e = Encoder(words, SST2, config(), 16)(Example("dull " * 30, 0))
    assert e.sequences[0] == ids("<s> " + "dull " * 12 + "It was") and e.at == 14  # the option is the 16th token


def test_a_cloze_text_is_read_at_the_mask_and_cut_before_it(words):
    encode = Encoder(words, SST2, config(masked=True, positions=13), 64)
    assert encode(Example("fun", 0)).sequences == [ids("<s> fun It was <mask> . </s>")]
    e = encode(Example("dull " * 30, 0))  # 13 positions, of which the padding index 2 takes three
    assert e.sequences == [ids("<s> dull dull dull dull It was <mask> . </s>")]
    assert e.sequences[0][e.at] == ids("<mask>")[0]


def test_a_mask_may_come_first(words):
    """LM-BFF's TREC; 13 positions, of which the padding index takes three, so 10 tokens."""
    task = Task("t", "", " It was", (" dull", " great"), mask_first=True)
    encode = Encoder(words, task, config(masked=True, positions=13), 64)
    e = encode(Example("fun", 1))
    after = words.encode(": fun")
    assert e.sequences == [[*ids("<s> <mask>"), *after, *ids("</s>")]] and e.at == 1
    e = encode(Example("dull " * 30, 0))
    assert len(e.sequences[0]) == 10
    assert e.sequences[0][:2] == ids("<s> <mask>") and e.sequences[0][-1:] == ids("</s>")


def test_a_label_word_of_several_tokens_is_refused_at_the_mask(words):
    with pytest.raises(ValueError, match="' very fun'.*one token.*got 2"):
        Encoder(words, Task("t", "", " It was", (" very fun", " dull")), config(masked=True), 64)


def test_options_that_the_tokenizer_cannot_tell_apart_are_refused(words):
    for masked in (False, True):
        with pytest.raises(ValueError, match="tell the options apart.*awful"):
            Encoder(words, Task("t", "", " It was", (" awful", " superb")), config(masked), 64)(Example("fun", 0))


def test_a_tokenizer_of_another_model_is_refused(words):
    small = config()
    small.vocab_size = 10
    with pytest.raises(ValueError, match="token id 10 is outside the model's vocabulary of 10"):
        Encoder(words, SST2, small, 64)(Example("fun", 0))


@pytest.mark.parametrize(("masked", "limit"), [(False, 2), (True, 6)])
def test_a_limit_without_room_for_any_text_is_refused(words, masked, limit):
    encode = Encoder(words, SST2, config(masked), limit)
    with pytest.raises(ValueError, match=f"{limit} tokens leave no room"):
        encode(Example("fun", 0))
    encode = Encoder(words, SST2, config(masked), limit + 1)
    assert len(encode(Example("fun dull", 0)).sequences[0]) <= limit + 1


def test_options_of_unequal_length_keep_the_same_prompt(words):
    task = Task("t", "", " It was", (" not very great", " dull"))
    e = Encoder(words, task, config(), 8)(Example("fun " * 20, 0))
    assert e.sequences == [ids("<s> fun fun It was not very great"), ids("<s> fun fun It was dull")]


# ---------------------------------------------------------------- scores


def lm_and_batches(words, share: bool, masked: bool = False):
    special = dict(vocab_size=len(PIECES), bos_token_id=0, eos_token_id=1, pad_token_id=2)
    lm = create((tiny_roberta if masked else tiny_llama)(**special), seed=3)
    for stored in lm.store.values():
        if stored.value.ndim == 2:
            stored.value.mul_(10)  # or every score would be near 0
    encode = Encoder(words, SST2, lm.config, 64, share=share)
    return lm, [encode(Example(s, i % 2)) for i, s in enumerate(("fun", "not very dull", "dull . very fun ."))]


def softmaxes(lm, encoded):
    batch = collate(encoded, pad=2, device=torch.device("cpu"))
    return option_scores(lm, batch, lm.stored_view())[0].softmax(-1)


def test_scores_from_one_forward_equal_those_of_each_option_run_alone(words):
    """The normaliser over the vocabulary cancels; float32 rounding of a log-softmax is what is left."""
    lm, shared = lm_and_batches(words, share=True)
    _, apart = lm_and_batches(words, share=False)
    assert len(shared[0].sequences) == 1 and len(apart[0].sequences) == 2
    assert softmaxes(lm, shared).std() > 0.05
    torch.testing.assert_close(softmaxes(lm, shared), softmaxes(lm, apart), atol=1e-5, rtol=0)


def test_a_batch_that_mixes_both_kinds_scores_alike(words):
    lm, shared = lm_and_batches(words, share=True)
    _, apart = lm_and_batches(words, share=False)
    torch.testing.assert_close(softmaxes(lm, [shared[0], *apart[1:]]), softmaxes(lm, shared), atol=1e-5, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_an_example_scores_alike_whatever_it_is_batched_with(words, masked):
    lm, encoded = lm_and_batches(words, share=True, masked=masked)
    together, alone = softmaxes(lm, encoded), torch.cat([softmaxes(lm, [e]) for e in encoded])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_padding_beyond_the_longest_changes_no_score(words, masked, share):
    """To a length that steps of other lengths have too (train.batches_of)."""
    lm, encoded = lm_and_batches(words, share or masked, masked)
    padded = collate(encoded, 2, torch.device("cpu"), tokens=24)
    assert padded.tokens.shape == padded.mask.shape == (3, 24)
    torch.testing.assert_close(option_scores(lm, padded, lm.stored_view())[0].softmax(-1), softmaxes(lm, encoded),
                               atol=1e-5, rtol=0)  # fmt: skip


OPTIONS = {"apart": (" not great", " dull"), "alike": (" not great", " not dull", " not"),
           "one token": (" great", " dull")}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_scores_are_log_probabilities_of_the_answer_tokens(words, options):
    """By hand: log-softmax of the full logits at the position before each token, mean over the option's tokens.  Each
    option has a forward of its own there; here all options of all examples share one, and their prompts."""
    lm, _ = lm_and_batches(words, share=True)
    encode = Encoder(words, Task("t", "", " It was", options), lm.config, 64, share=False)
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
    """Packed: the prompt once, then what each option's tokens need; the last one is only predicted."""
    packed = pack(Encoded([[1, 2, 3, 4, 5], [1, 2, 3, 6, 7, 8], [1, 2, 3, 9]], [[4, 5], [6, 7, 8], [9]], -1, 0))
    assert packed.tokens == [1, 2, 3, 4, 6, 7] and packed.branch == [0, 0, 0, 1, 2, 2]
    assert packed.reads == [(2, 4, 0), (3, 5, 0), (2, 6, 1), (4, 7, 1), (5, 8, 1), (2, 9, 2)]


def test_quality_is_the_mean_over_examples_not_over_batches(words):
    lm, encoded = lm_and_batches(words, share=True)
    p = softmaxes(lm, encoded)
    labels = torch.tensor([e.label for e in encoded])
    quality = evaluate(lm, encoded, pad=2, batch_size=2)
    assert quality.accuracy == pytest.approx((p.argmax(-1) == labels).float().mean().item())
    assert quality.loss == pytest.approx(-p[range(3), labels].log().mean().item(), abs=1e-5)
    batch = collate(encoded, pad=2, device=torch.device("cpu"))
    assert losses(lm, batch, lm.stored_view()).item() == pytest.approx(quality.loss, abs=1e-5)


@pytest.mark.parametrize(("name", "zero_shot"), [("zollama-28m", 52.2), ("zoroberta-26m", 61.6)])
def test_real_zero_shot_accuracy_is_what_transformers_gave(real_model, real_data, name, zero_shot):
    """Measured apart with `transformers` on the same prompts; half an example of 872 is 0.06 points."""
    directory = real_model(name)
    lm = load(directory)
    encode = Encoder(Tokenizer(directory), SST2, lm.config, 128)
    test = load_splits(SST2, str(real_data("k-shot").parent), 512, 42, 0, 0, 1000).test
    quality = evaluate(lm, [encode(e) for e in test], lm.config.pad_token_id or 0, batch_size=128)
    assert 100 * quality.accuracy == pytest.approx(zero_shot, abs=0.06)
