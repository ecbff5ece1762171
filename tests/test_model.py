"""The models against `transformers`: logits, generation, and directories written by either for the other.

Logits agree within 1e-4, the contract.  Differences come from the order of fp32 sums: 1e-5 at most was seen here,
for logits of size 5 to 17.  Bugs planted in the model move logits by far more, most of them by 0.1 and up.
"""

import json
import weakref
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import (
    auto_class,
    largest_gap,
    oracle_logits,
    padded_batch,
    random_oracle,
    read_oracle,
    through_buffers,
    tiny_llama,
    tiny_roberta,
)  # fmt: skip
from oracles import codes_of, scales_of

from data.tokenizer import Tokenizer
from gpu.code_products import enable_code_products
from model import MAX_RECOMPILES, KVCache, Linear, create, expected_shapes, load
from quant import FORMATS, quantise_tokens
from random_bits import Key
from runtime import checkpoints
from runtime.checkpoints import save_stored, weights_sha256
from runtime.model_configs import config_of
from tensor_train import TRAINED_VECTOR, Spec, attach
from zo_optim import ZO, probe_losses

TOLERANCE = 1e-4
PADDING = ("no mask", "full", "left", "right")
LLAMA3 = {  # 16 positions of original context: of the four frequencies one is kept, one blended, two slowed
    "rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {  # of the four frequencies two are blended, one is slowed
    "rope_type": "yarn", "rope_theta": 100.0, "factor": 8.0, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN_OPTIONS = {"original_max_position_embeddings": 1024,  # of which the slowest wave makes more turns than beta_slow
                "beta_fast": 8.0, "beta_slow": 0.5, "attention_factor": 1.5, "truncate": False}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
LLAMAS = {
    "grouped heads": tiny_llama(),
    "one key-value head": tiny_llama(num_key_value_heads=1),
    "as many key-value heads": tiny_llama(num_key_value_heads=4),
    "tied": tiny_llama(tie_word_embeddings=True),
    "biases": tiny_llama(attention_bias=True, mlp_bias=True),
    "heads wider than hidden / heads": tiny_llama(head_dim=16),
    "rope base": tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
    "llama3 rope": tiny_llama(rope_parameters=LLAMA3),
    "linear rope": tiny_llama(rope_parameters={"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}),
    "yarn rope": tiny_llama(rope_parameters=YARN),
    "yarn rope, all set": tiny_llama(rope_parameters=YARN | YARN_OPTIONS),
    "dynamic rope": tiny_llama(rope_parameters=DYNAMIC, max_position_embeddings=16),
}
ROBERTAS = {
    "roberta": tiny_roberta(),
    "untied roberta": tiny_roberta(tie_word_embeddings=False),
    "other padding id": tiny_roberta(pad_token_id=2, eos_token_id=1, type_vocab_size=1),
}
BOTH = {"llama": tiny_llama(attention_bias=True), "tied llama": LLAMAS["tied"], "roberta": ROBERTAS["roberta"]}


def one_of(table: dict[str, dict]):
    return pytest.mark.parametrize("raw", table.values(), ids=table.keys())


def random_model(raw: dict, directory, seed: int = 0, **options):
    random_oracle(raw, directory, seed)
    return load(directory, **options)


def edit_config(directory, drop=(), **changes) -> None:
    path = directory / "config.json"
    raw = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(raw | changes))


def perturbed(lm):
    """The view of two copies that a step hands to its loss."""
    views = []
    probe_losses(lm.weights, lambda view: views.append(view) or torch.zeros(2), Key(0, 0), ZO())
    return views[0]


def some_tokens(B: int, T: int) -> torch.Tensor:
    return torch.randint(3, 90, (B, T), generator=torch.Generator().manual_seed(T))


# ---------------------------------------------------------------- logits


@one_of(LLAMAS | ROBERTAS)
def test_logits_are_those_of_transformers(raw, tmp_path):
    oracle = random_oracle(raw, tmp_path)
    lm = load(tmp_path)
    for padding in PADDING:
        tokens, mask = padded_batch(raw, padding, T=37)
        assert largest_gap(lm(tokens, mask), oracle_logits(oracle, tokens, mask), mask) < TOLERANCE, padding


@pytest.mark.parametrize("name", ["zollama-28m", "zoroberta-26m"])
def test_real_logits_are_those_of_transformers(name, real_model):
    lm = load(real_model(name))
    oracle = read_oracle(real_model(name), lm.raw_config)
    for padding in PADDING:
        tokens, mask = padded_batch(lm.raw_config, padding, T=24)
        assert largest_gap(lm(tokens, mask), oracle_logits(oracle, tokens, mask), mask) < TOLERANCE, padding


@one_of({name: raw for name, raw in LLAMAS.items() if "rope_parameters" in raw and name != "rope base"})
def test_scaled_rope_at_lengths_within_and_beyond_the_original_context(raw, tmp_path):
    """And beyond it scaling changes logits by far more than the tolerance, or the tests of parity would pass without
    it.  The oracle of dynamic scaling remembers the longest sequence that it has seen, so it is read again."""
    random_oracle(raw, tmp_path)
    plain = create(raw | {"rope_parameters": {"rope_theta": 100.0}})
    for T in (5, 16, 17, 40, 100):
        tokens, _ = padded_batch(raw, "no mask", T=T)
        got = load(tmp_path)(tokens)
        assert largest_gap(got, oracle_logits(read_oracle(tmp_path, raw), tokens)) < TOLERANCE, T
    plain.weights = load(tmp_path).weights
    assert (plain(tokens) - got).abs().max() > 0.1


def test_settings_that_are_spelled_twice_agree_or_are_refused():
    """transformers takes one of them, and not always the same one."""
    rope = config_of(tiny_llama(rope_parameters=YARN)).rope
    older = {name: value for name, value in YARN.items() if name not in ("rope_theta", "rope_type")} | {"type": "yarn"}
    for same in (
        dict(rope_parameters=YARN, rope_scaling=YARN), dict(rope_parameters=YARN, rope_theta=100.0),
        dict(rope_parameters=YARN, rope_scaling=older, rope_theta=100.0), dict(rope_scaling=older, rope_theta=100),
        dict(rope_parameters=YARN | {"type": "yarn"}, original_max_position_embeddings=64),
        dict(rope_scaling=older | {"original_max_position_embeddings": None}, rope_theta=100.0,
             original_max_position_embeddings=64),
        dict(rope_scaling=older | {"original_max_position_embeddings": None}, rope_theta=100.0,
             max_position_embeddings=64),
    ):  # fmt: skip
        assert config_of(tiny_llama(**same)).rope == rope, same
    linear = {"type": "linear", "factor": 2.0}
    for different, values in (
        (dict(rope_parameters={"rope_type": "default"}, rope_scaling=linear), ("'default'", "'linear'")),
        (dict(rope_parameters=YARN, rope_scaling=YARN | {"factor": 4.0}), ("8.0", "4.0")),
        (dict(rope_parameters=YARN, rope_scaling=older), ("rope_parameters", "rope_scaling")),  # without the base
        (dict(rope_parameters=YARN, rope_theta=500.0), ("rope_parameters.rope_theta 100.0", "rope_theta 500.0")),
        (dict(rope_scaling=linear | {"rope_type": "yarn"}), ("rope_type 'yarn'", "type 'linear'")),
        (dict(rope_parameters=YARN, original_max_position_embeddings=32), ("embeddings 64", "embeddings 32")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="contradict each other: keep one") as refused:
            config_of(tiny_llama(**different))
        assert all(value in str(refused.value) for value in values), refused.value


@pytest.mark.parametrize("scaled", [False, True], ids=["default", "llama3"])
def test_the_older_form_of_rope_means_the_same_as_the_newer(scaled, tmp_path):
    """Files written before transformers 5 have rope_theta on its own and rope_scaling, or null, beside it."""
    newer = LLAMA3 | {"rope_theta": 500.0} if scaled else {"rope_type": "default", "rope_theta": 500.0}
    older = {name: value for name, value in newer.items() if name != "rope_theta"} if scaled else None
    oracle = random_oracle(tiny_llama(rope_parameters=newer), tmp_path)
    edit_config(tmp_path, drop=["rope_parameters"], rope_theta=500.0, rope_scaling=older)
    tokens, _ = padded_batch(tiny_llama(), "no mask", T=40)
    want = oracle_logits(oracle, tokens)
    assert largest_gap(load(tmp_path)(tokens), want) < TOLERANCE
    assert largest_gap(oracle_logits(read_oracle(tmp_path, tiny_llama()), tokens), want) < TOLERANCE
    if scaled:  # the oldest name of the kind
        oldest = {"type": "llama3"} | {name: value for name, value in older.items() if name != "rope_type"}
        oldest = config_of(tiny_llama(rope_theta=500.0, rope_scaling=oldest))
        assert oldest.rope == config_of(tiny_llama(rope_parameters=newer)).rope


def test_llama3_rope_changes_logits_at_these_lengths(tmp_path):
    """Guards the parity tests above: at positions where scaling did nothing they would pass without it."""
    tokens, _ = padded_batch(tiny_llama(), "no mask", T=37)
    scaled = random_model(tiny_llama(rope_parameters=LLAMA3), tmp_path)(tokens)
    edit_config(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 100.0})
    assert (load(tmp_path)(tokens) - scaled)[:, 20:].abs().max() > 0.1


@one_of(BOTH)
def test_padding_does_not_matter(raw, tmp_path):
    """What stands there changes no bit: the sums are the same, in the same order.  On the right, what reads left to
    right needs no mask (another kernel may sum in another order: 1e-5).  A row of padding alone is finite."""
    lm = random_model(raw, tmp_path)
    for padding in ("left", "right"):
        tokens, mask = padded_batch(raw, padding)
        other = tokens.masked_fill(mask == 0, 50)
        assert torch.equal(lm(tokens, mask)[mask.bool()], lm(other, mask)[mask.bool()]), padding
    assert (largest_gap(lm(tokens), lm(tokens, mask), mask) < 1e-5) == (raw["model_type"] == "llama")
    mask[0] = 0
    assert lm(tokens, mask).isfinite().all()


@one_of(BOTH)
def test_wanted_tokens_and_words_are_those_of_all(raw, tmp_path):
    """Of no, one or several tokens of a row, in any order and twice.  A product of another size may sum in another
    order: 1e-5 for logits near 5."""
    lm, words = random_model(raw, tmp_path), torch.tensor([7, 3, 96])
    for padding in ("no mask", "right", "left"):
        tokens, mask = padded_batch(raw, padding)
        T, view = tokens.shape[1], lm.stored_view()
        wanted = torch.tensor([1, 0, 1, 1]), torch.tensor([T - 1, T // 2, T // 2, T - 1])
        want, got = lm.hidden(tokens, mask, view)[:, *wanted], lm.hidden(tokens, mask, view, wanted)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
        scores = lm.score(got, view, words)[0]
        torch.testing.assert_close(scores, lm(tokens, mask)[*wanted][:, words], rtol=0, atol=1e-5)


@one_of(BOTH)
def test_the_last_block_computes_no_more_than_is_wanted(raw, monkeypatch):
    lm, rows = create(raw), []
    tokens, mask = padded_batch(raw, "left")
    run = Linear.forward
    monkeypatch.setattr(Linear, "forward", lambda self, x: rows.append(x[0, ..., 0].numel()) or run(self, x))
    lm.hidden(tokens, mask, lm.stored_view(), wanted=(torch.tensor([1]), torch.tensor([3])))
    of_a_block = {"llama": 7, "roberta": 6}[raw["model_type"]]
    last = rows[of_a_block * (raw["num_hidden_layers"] - 1) :]
    assert set(rows[: -len(last)]) == {tokens.numel()}
    assert last == [tokens.numel()] * 3 + [1] * (len(last) - 3)  # keys, values, queries; then one token


class SeveralModels:
    """Their weights as one view."""

    def __init__(self, *lms):
        self.views, self.probes = [lm.stored_view() for lm in lms], len(lms)

    def read(self, *which):
        return torch.cat([view.read(*which) for view in self.views])


@one_of(BOTH)
def test_a_view_of_two_copies_gives_the_logits_of_two_models(raw, tmp_path):
    """Oracle: each model on its own.  Batched products may sum in another order: 1e-5 for logits near 5."""
    lms = [random_model(raw, tmp_path / str(seed), seed) for seed in (0, 1)]
    tokens, mask = padded_batch(raw, "left")
    got = lms[0](tokens, mask, SeveralModels(*lms))
    torch.testing.assert_close(got, torch.stack([lm(tokens, mask) for lm in lms]), rtol=0, atol=1e-5)


@one_of(BOTH)
def test_bf16_logits_are_as_near_to_fp32_as_rounding_allows(raw, tmp_path):
    """How far rounding carries depends on the weights, so the oracle is transformers' own bf16 model, which rounds
    weights and activations at the same places, and norms' weights besides.  Root mean squares over 3,000 logits
    that round independently agree within a quarter; half as much again is allowed.
    """
    oracle = random_oracle(raw, tmp_path)
    tokens, _ = padded_batch(raw, "no mask")
    exact, ours = load(tmp_path)(tokens), load(tmp_path, dtype=torch.bfloat16)(tokens)
    theirs = oracle_logits(oracle.to(torch.bfloat16), tokens).float()
    error, allowed = ((logits - exact).norm() / exact.norm() for logits in (ours, theirs))
    assert ours.dtype == torch.float32
    assert 2**-12 < error < 1.5 * allowed < 0.05  # the lower bound: it did compute in bf16


def test_roberta_refuses_more_tokens_than_positions():
    """40 positions, of which the padding id and those below it are never used: 38 tokens are the most."""
    lm = create(tiny_roberta())
    assert lm(torch.full((1, 38), 5)).isfinite().all()
    with pytest.raises(ValueError, match="39 tokens exceed 40 positions"):
        lm(torch.full((1, 39), 5))


# ---------------------------------------------------------------- generation: tokens must be equal
# The two likeliest tokens differ by 5e-4 or more at every step here, so that rounding decides none of them.


def oracle_tokens(oracle, tokens, mask, new: int) -> torch.Tensor:
    mask = torch.ones_like(tokens) if mask is None else mask
    return oracle.generate(tokens, attention_mask=mask, max_new_tokens=new, do_sample=False)


def without_cache(lm, tokens, mask, new: int) -> torch.Tensor:
    """Greedy generation by its definition, with no end token."""
    mask = torch.ones_like(tokens) if mask is None else mask
    for _ in range(new):
        following = lm(tokens, mask)[:, -1].argmax(-1, keepdim=True)
        tokens, mask = torch.cat((tokens, following), 1), torch.cat((mask, torch.ones_like(following)), 1)
    return tokens


@one_of(LLAMAS)
def test_generated_tokens_are_those_of_transformers(raw, tmp_path):
    oracle = random_oracle(raw, tmp_path)
    for padding in ("no mask", "left"):
        tokens, mask = padded_batch(raw, padding)
        assert torch.equal(load(tmp_path).generate(tokens, 20, mask), oracle_tokens(oracle, tokens, mask, 20)), padding
    assert torch.equal(load(tmp_path).generate(tokens, 0, mask), tokens)


@pytest.mark.full
@pytest.mark.parametrize("padding", ["no mask", "left"])
def test_real_generated_tokens_are_those_of_transformers(padding, real_model):
    directory = real_model("zollama-28m")
    ids = Tokenizer(directory).encode("The film was directed by a young actor who had never seen one of the")
    lengths = [len(ids), 9, 4] if padding == "left" else [7, 7, 7]
    tokens = torch.tensor([[0] * (max(lengths) - n) + [1] + ids[:n] for n in lengths])
    mask = (tokens != 0).long() if padding == "left" else None
    want = oracle_tokens(read_oracle(directory, tiny_llama()), tokens, mask, 24)
    assert torch.equal(load(directory).generate(tokens, 24, mask), want)


@pytest.mark.parametrize("rows", [{0: 3}, {0: 3, 1: 5}, {0: 2, 1: 5, 2: 8}], ids=["one", "two", "all rows end"])
@pytest.mark.parametrize("pad", [0, None], ids=["padding token", "no padding token"])
def test_generation_ends_at_end_tokens_as_in_transformers(rows, pad, tmp_path):
    """The end tokens are what given rows say after given numbers of new tokens."""
    tokens, raw = padded_batch(tiny_llama(), "no mask")[0], tiny_llama(eos_token_id=None)
    free = without_cache(random_model(raw, tmp_path / "endless"), tokens, None, 20)[:, tokens.shape[1] :]
    ends = [free[row, after].item() for row, after in rows.items()]
    raw |= {"eos_token_id": ends[0] if len(ends) == 1 else ends, "pad_token_id": pad}
    got = random_model(raw, tmp_path).generate(tokens, 20)
    assert torch.equal(got, oracle_tokens(read_oracle(tmp_path, raw), tokens, None, 20))
    new = got[:, tokens.shape[1] :]
    last = new[0, list(rows.values())[0] + 1 :]
    assert (last == (ends[0] if pad is None else pad)).all() and not torch.equal(new, free[:, : new.shape[1]])
    assert (new.shape[1] < 20) == (len(rows) == 3)


def test_without_an_end_token_generation_goes_on(tmp_path):
    """eos_token_id null means none.  The token that it defaults to, 2, is made the likeliest of all."""
    raw = tiny_llama(eos_token_id=None)
    oracle = random_oracle(raw, tmp_path)
    oracle.lm_head.weight.data[2] *= 20  # logits of size 20 for token 2, positive in half of all contexts
    oracle.save_pretrained(tmp_path)
    tokens, _ = padded_batch(raw, "no mask")
    got = load(tmp_path).generate(tokens, 12)
    assert (got[:, tokens.shape[1] :] == 2).any()
    assert torch.equal(got, oracle_tokens(oracle, tokens, None, 12))


def test_the_cache_changes_nothing(tmp_path):
    """Tokens are those of recomputation; hidden states those of one pass, but for sums over as many terms in another
    order: 1e-5 for values near 3."""
    raw = tiny_llama(eos_token_id=None)
    lm = random_model(raw, tmp_path)
    for padding in ("no mask", "left"):
        tokens, mask = padded_batch(raw, padding)
        assert torch.equal(lm.generate(tokens, 20, mask), without_cache(lm, tokens, mask, 20))
    want = lm.hidden(tokens, mask, lm.stored_view())[0]
    for pieces in [12], [7, 5], [1] * 12, [9, 1, 2]:
        cache, seen, parts = KVCache(), 0, []
        for n in pieces:
            parts.append(lm.hidden(tokens[:, seen : seen + n], mask[:, : seen + n], lm.stored_view(), cache=cache)[0])
            seen += n
        torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], want[mask.bool()], rtol=0, atol=1e-5)


def test_what_cannot_be_continued_is_refused():
    tokens, mask = padded_batch(tiny_llama(), "right")
    for raw, message in (tiny_llama(), "left padding"), (tiny_roberta(), "Roberta is a masked language model"):
        with pytest.raises(ValueError, match=message):
            create(raw).generate(tokens, 2, mask)


# ---------------------------------------------------------------- saving


def save_as_stored(lm, directory) -> None:
    save_stored(directory, lm.raw_config, lm.format, lm.residual, lm.weights, lm.other_files)


@one_of(BOTH)
@pytest.mark.parametrize("weights", FORMATS)
def test_what_we_save_is_read_to_the_bit(raw, weights, tmp_path):
    """By `transformers` in fp32 (bf16 would round norms and biases, which we keep in fp32): the very numbers that our
    stores stand for; and as codes by us."""
    lm = random_model(raw, tmp_path / "in", weights=weights)
    lm.save(tmp_path / "dense")
    oracle = read_oracle(tmp_path / "dense", raw)
    theirs, (tokens, mask) = oracle.state_dict(), padded_batch(raw, "right")
    for name, stored in lm.weights.items():
        want = stored.tensors()[""].float()
        if ".scale" in stored.tensors():
            want = (codes_of(stored, weights) * scales_of(stored, weights)).float().view(stored.shape)
        assert torch.equal(theirs[name], want), name
    assert largest_gap(lm(tokens, mask), oracle_logits(oracle, tokens, mask), mask) < TOLERANCE
    save_as_stored(lm, tmp_path / "stored")
    again = load(tmp_path / "stored", weights=weights).weights
    assert weights_sha256(again) == weights_sha256(lm.weights) and list(again) == list(lm.weights)


@pytest.mark.parametrize("weights, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.float32)])
def test_the_saved_config_names_the_dtype_that_it_is_read_in(weights, dtype, tmp_path):
    random_oracle(tiny_llama(), tmp_path / "in")
    edit_config(tmp_path / "in", torch_dtype="float16")  # the older name of the key, which would contradict the newer
    load(tmp_path / "in", weights=weights).save(tmp_path / "out")
    assert "torch_dtype" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert auto_class(tiny_llama()).from_pretrained(tmp_path / "out").dtype == dtype


@pytest.mark.parametrize("weights", FORMATS)
def test_a_model_can_be_saved_over_the_directory_that_it_came_from(weights, tmp_path):
    for save in (lambda lm, directory: lm.save(directory), save_as_stored):
        lm = random_model(tiny_llama(), tmp_path, weights=weights)
        digest, tokens = weights_sha256(lm.weights), some_tokens(2, 9)
        before = lm(tokens)
        for _ in range(2):
            save(lm, tmp_path)
        assert torch.equal(lm(tokens), before) and weights_sha256(lm.weights) == digest
    assert weights_sha256(load(str(tmp_path), weights=weights).weights) == digest


@one_of(BOTH)
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_shards_are_read_by_us_and_by_transformers(raw, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARD_BYTES", 13_000)
    lm = random_model(raw, tmp_path / "in", weights=weights)
    lm.save(tmp_path / "dense")
    save_as_stored(lm, tmp_path / "stored")
    for folder, stem in ("dense", "model"), ("stored", "model" if weights == "fp32" else "codes"):
        shards = list((tmp_path / folder).glob(f"{stem}-*.safetensors"))
        assert len(shards) > 1 and not (tmp_path / folder / f"{stem}.safetensors").exists()
        assert max(path.stat().st_size for path in shards) < 13_000 + 4096  # and the header
    assert weights_sha256(load(tmp_path / "stored", weights=weights).weights) == weights_sha256(lm.weights)
    theirs = read_oracle(tmp_path / "dense", raw).state_dict()
    assert all(torch.equal(theirs[name], stored.dequantise().view(stored.shape)) for name, stored in lm.weights.items())


def test_saving_takes_the_tokenizer_along(tmp_path):
    create(tiny_llama()).save(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.model").write_bytes(b"pieces")
    load(tmp_path / "in").save(tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"pieces"


def test_the_digest_sees_one_bit_of_any_tensor():
    """And its name."""
    weights = create(tiny_llama(num_hidden_layers=1)).weights
    digest = weights_sha256(weights)
    assert weights_sha256({f"x{name}": stored for name, stored in weights.items()}) != digest
    digests = {digest}
    for stored in weights.values():
        stored.value.view(torch.int32).view(-1)[-1] ^= 1
        digests.add(weights_sha256(weights))
    assert len(digests) == len(weights) + 1


# ---------------------------------------------------------------- loading and configs


@pytest.mark.parametrize("way", [nullcontext, through_buffers])
def test_loading_holds_one_dense_tensor_at_a_time(way, tmp_path, monkeypatch):
    """Every tensor is encoded before the next one is read from disk, and gone when that one is encoded."""
    random_oracle(tiny_llama(), tmp_path)
    real_read, real_encode, events, before = checkpoints.read_tensors, checkpoints.encode, [], []

    def read_tensors(*args):
        for name, tensor in real_read(*args):
            events.append("read")
            yield name, tensor

    def encode(tensor, *form):
        events.append("encode")
        assert not [ref() for ref in before if ref() is not None]
        if tensor.ndim == 2:  # one-dimensional tensors are kept as they are
            before.append(weakref.ref(tensor))
        return real_encode(tensor, *form)

    monkeypatch.setattr(checkpoints, "read_tensors", read_tensors)
    monkeypatch.setattr(checkpoints, "encode", encode)
    with way():
        load(tmp_path, weights="int8")
    assert len(before) == 2 + 7 * 2
    assert events == ["read", "encode"] * (len(before) + 5)  # and five norms


REFUSED = {
    "model_type 'gpt2' is not supported": tiny_llama(model_type="gpt2"),
    "model_type None is not supported": {"hidden_size": 32},
    r"model_type \['llama'\] is not supported": tiny_llama(model_type=["llama"]),
    "hidden_act 'gelu' is not supported for llama": tiny_llama(hidden_act="gelu"),
    "hidden_act 'relu' is not supported for roberta": tiny_roberta(hidden_act="relu"),
    "position_embedding_type 'relative_key' is not supp": tiny_roberta(position_embedding_type="relative_key"),
    "is_decoder True is not supported": tiny_roberta(is_decoder=True),
    "head_dim must be even for rotary embedding, got 7": tiny_llama(head_dim=7),
    "4 heads do not split into 3 key-value heads": tiny_llama(num_key_value_heads=3),
    "5 heads do not divide hidden_size 32": tiny_roberta(num_attention_heads=5),
    "rope scaling 'longrope' is not supported": tiny_llama(rope_scaling={"type": "longrope", "factor": 2.0}),
    "rope scaling 'mrope' is not supported": tiny_llama(rope_parameters={"rope_type": "mrope", "rope_theta": 1e4}),
    "yarn rope scaling lacks factor": tiny_llama(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
    "scaling by mscale is not supported": tiny_llama(rope_scaling=YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}),
    "rope_theta must be above 1 for yarn, got 1.0": tiny_llama(rope_parameters=YARN | {"rope_theta": 1.0}),
    "rope_factor inf is not a usable float from 1e-06": tiny_llama(rope_parameters=YARN | {"factor": float("inf")}),
    "rope_truncate 1 is not a usable bool": tiny_llama(rope_parameters=YARN | {"truncate": 1}),
    "partial_rotary_factor 0.5 is not supported": tiny_llama(partial_rotary_factor=0.5),
    "pad_token_id 97 is outside the vocabulary of 97": tiny_llama(pad_token_id=97),
    "bos_token_id 32000 is outside the vocabulary of 97": tiny_llama(bos_token_id=32000),
    "eos_token_id 200 is outside the vocabulary of 97": tiny_llama(eos_token_id=[2, 200]),
    "pad_token_id 100 is outside the vocabulary of 97": tiny_roberta(pad_token_id=100),
    "rope_factor '8' is not a usable float": tiny_llama(rope_parameters=LLAMA3 | {"factor": "8"}),
    "llama3 rope scaling lacks factor": tiny_llama(rope_scaling={"rope_type": "llama3"}),
}
UNUSABLE = {  # values of the wrong type or size; the message has the field's name
    "num_attention_heads": (0, -4, "4", 4.0, True), "num_key_value_heads": (-2, "2"), "hidden_size": ("32", [32], 0),
    "vocab_size": (-97, "97", 97.5), "num_hidden_layers": (0, "2"), "rms_norm_eps": ("1e-5", -1.0),
    "rope_theta": ("10000", 0, -1.0), "rope_scaling": ("linear", 2.0), "eos_token_id": ("2", [2, "3"], 1.5),
    "tie_word_embeddings": ("false", 0),
}  # fmt: skip


def test_configs_that_the_model_does_not_implement_are_refused_by_name():
    wrong = [(name, tiny_llama(**{name: value})) for name, values in UNUSABLE.items() for value in values]
    for message, raw in [*REFUSED.items(), *wrong]:
        with pytest.raises(ValueError, match=message):
            config_of(raw)


@one_of(BOTH)
def test_created_weights_follow_from_the_seed(raw):
    lm, again, other = (create(raw, seed=seed) for seed in (1, 1, 2))
    assert weights_sha256(lm.weights) == weights_sha256(again.weights) != weights_sha256(other.weights)
    for name, stored in lm.weights.items():
        if len(stored.shape) == 1:
            assert (stored.value == (0 if name.endswith("bias") else 1)).all(), name
    five_sigma = 5 * 0.02 / (2 * 97 * 32) ** 0.5  # the standard deviation's own deviation is sigma / sqrt(2 n)
    assert abs(lm.weights[lm.embedding].value.std() - 0.02) < five_sigma
    assert set(lm.weights) == set(expected_shapes(lm.config))


# ---------------------------------------------------------------- faster forwards


@pytest.mark.parametrize("kind", ["fp8", "int8"])
@pytest.mark.parametrize("raw", [tiny_llama(), tiny_roberta()], ids=["llama", "roberta"])
def test_products_of_codes_give_the_logits_of_fake_quantisation(raw, kind):
    """Products of codes beside bfloat16 products of the same numbers: what is left is bfloat16's rounding."""
    raw |= {"hidden_size": 64, "intermediate_size": 96}
    lm, tokens = create(raw, weights=kind, dtype=torch.bfloat16), some_tokens(2, 7)
    lm.round_inputs(partial(quantise_tokens, kind=kind))
    fake = lm(tokens)
    enable_code_products(lm)
    assert 0 < (lm(tokens) - fake).abs().max() < 2**-5 * fake.abs().max()
    for weights, dtype, size in (kind, torch.float32, 96), ("int4", torch.bfloat16, 96), (kind, torch.bfloat16, 56):
        with pytest.raises(ValueError, match="products of codes need"):
            enable_code_products(create(raw | {"intermediate_size": size}, weights=weights, dtype=dtype))


@pytest.fixture
def compiler():
    """What is compiled is kept by code object, of all models together, and no more than eight of each."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    torch.compiler.reset()


@pytest.mark.full
@pytest.mark.parametrize("raw", [tiny_llama(), tiny_roberta()], ids=["llama", "roberta"])
def test_compiled_blocks(raw, compiler):
    """The same logits and states from one graph for all batches and lengths: of all layers but the last where that is
    asked for some tokens alone, of that one, and each for each number of copies."""
    lm, compiled, graphs = create(raw), create(raw), []
    compiled.compile_blocks(lambda graph, inputs: graphs.append(graph) or graph.forward)
    copies = perturbed(lm)
    with torch.no_grad():
        for B, T in (5, 9), (3, 12), (2, 7):  # none of which is another size of the model: those would count as one
            tokens, wanted = some_tokens(B, T), (torch.arange(B), torch.full((B,), T - 2))
            for view in lm.stored_view(), copies:
                assert (compiled(tokens, view=view) - lm(tokens, view=view)).abs().max() < 1e-5
                gap = compiled.hidden(tokens, None, view, wanted) - lm.hidden(tokens, None, view, wanted)
                assert gap.abs().max() < 1e-5
    assert len(graphs) == 4


@pytest.mark.full
@pytest.mark.parametrize("raw", [tiny_llama(num_hidden_layers=3), tiny_roberta()], ids=["llama", "roberta"])
def test_blocks_compiled_for_all_that_a_run_may_ask(raw, compiler):
    """One sequence and several, one wanted token a sequence and more, one copy and two, with gradients and without: all
    of them fit into what torch keeps."""
    lm, graphs = create(raw), []
    lm.compile_blocks(lambda graph, inputs: graphs.append(graph) or graph.forward)
    for stored in lm.weights.values():
        stored.value.requires_grad_()
    for B, T in (5, 9), (1, 7):
        tokens, last = some_tokens(B, T), (torch.arange(B), torch.full((B,), T - 1))
        for wanted in last, tuple(x.repeat(2) for x in last):
            lm.hidden(tokens, None, lm.stored_view(), wanted).sum().backward()
            with torch.no_grad():
                for view in lm.stored_view(), perturbed(lm):
                    lm.hidden(tokens, None, view, wanted)
    assert len(graphs) <= MAX_RECOMPILES


def test_a_compiled_model_writes_uncompiled(compiler):
    """A growing cache would be compiled anew for each of its layers."""
    lm, compiled, graphs = create(tiny_llama()), create(tiny_llama()), []
    compiled.compile_blocks(lambda graph, inputs: graphs.append(graph) or graph.forward)
    assert torch.equal(compiled.generate(some_tokens(2, 5), 6), lm.generate(some_tokens(2, 5), 6)) and not graphs
    with torch.no_grad():
        compiled(some_tokens(2, 5))
    assert graphs


@pytest.mark.full
@pytest.mark.parametrize("spec", [Spec("adp", "mlp", 8, 2, identity=False), Spec("lora", "qv", 0, 2, identity=False)],
                         ids=["adp", "lora"])  # fmt: skip
def test_adapters_around_compiled_blocks(spec, compiler):
    """Also of a model that has run without them."""
    lm, compiled, tokens = create(tiny_llama()), create(tiny_llama()), some_tokens(3, 8)
    compiled.compile_blocks("eager")
    with torch.no_grad():
        plain = compiled(tokens)
        for model in (lm, compiled):
            attach(model, spec, 1)
            model.weights[TRAINED_VECTOR].value.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
        assert (compiled(tokens) - plain).abs().max() > 1e-3
        assert (compiled(tokens) - lm(tokens)).abs().max() < 1e-5
