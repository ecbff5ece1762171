"""QuZO in one file: int8 weights are fine-tuned by forward passes alone, and no float copy of them is ever kept.

`python docs/walkthrough.py` takes five steps on the embedded model.  It imports nothing of the project, yet finds the
projected gradients and codes of `python train.py --steps 5 --eval-every 5` to the last bit (tests/test_walkthrough.py).
Equations and algorithm 1 are QuZO's (EMNLP 2025); the estimate from two losses is MeZO's (NeurIPS 2023).

Shape key: R rows (outputs), C columns (inputs), N examples, T tokens, D hidden, d width of an attention head.
"""

import json
import zlib
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

TINY = Path(__file__).resolve().parent.parent / "data" / "tiny"
SEED, STEPS, BATCH_SIZE, LR, EPS = 0, 5, 32, 6e-4, 1e-3
MAX_CODE, MAX_LEVEL = 127, 7  # of int8 weights (-128 would make w and -w quantise unlike), of 4-bit directions

# ---- 1. Randomness is a function of a key.  A step needs its direction three times: ahead, back, and in the update.
# To keep it would take the memory of a model in floats, so it is drawn again, by a generator without a state.
# These are the purposes of a draw; no two of them share bits, and all that is unbiased below rests on that.
DIRECTION, DATA_ORDER = 0, 4  # the Gaussian u; which example comes when
PROBE_ROUNDING, UPDATE_ROUNDING = 1, 2  # u to u1, which the forward passes see; u to u2, which the weights move along
WEIGHT_ROUNDING = 3  # that move to whole codes


def random_bits(shape, step, name, purpose, bits=16):
    """16 or 31 random bits for each element of a tensor: [R, C] int64, by Philox4x32-10 (Salmon et al., SC 2011).

    Ten rounds mix four 32-bit words into 128 bits, for 8 columns.  31 bits are a neighbour's 16 above 15 of one's own.
    """
    (R, C), k0, k1 = shape, SEED & 0xFFFFFFFF, SEED >> 32
    c0 = np.arange(R * -(-C // 8), dtype=np.uint64)
    c1, c2, c3 = (np.full_like(c0, c) for c in (step, zlib.crc32(name.encode()), purpose))
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # 64-bit products, whose halves go separate ways
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF, (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    halves = np.stack((c0, c1, c2, c3), -1).astype(np.uint32).view(np.uint16)  # low half first (little-endian)
    h = torch.from_numpy(halves.astype(np.int64)).view(R, -1, 8)
    return ((h.roll(-1, 2) << 16 | h) >> 1 if bits == 31 else h).flatten(1)[:, :C]


# ---- 2. A direction is one Gaussian a weight, rounded to few bits.  It is made of integers up to its last line, so
# that every machine draws the same.  The table holds N(0, 1) as 65,536 equally likely integers in units of 2^-14 sigma:
# the quantile function in 2,048 linear pieces of 16 midpoints each, cut at 4 sigma, then its mirror image.
KNOTS = [round(NormalDist().inv_cdf(0.5 + j / 4096) * 4096) for j in range(2048)] + [4 * 4096]
HALF = [(KNOTS[j] * (31 - 2 * i) + KNOTS[j + 1] * (2 * i + 1) + 4) >> 3 for j in range(2048) for i in range(16)]
NORMAL_TABLE = torch.tensor(HALF + [-u for u in HALF])


def direction(shape, step, name, purpose):
    """Eq. 7: u1 (PROBE_ROUNDING) or u2 (UPDATE_ROUNDING), one Gaussian u rounded twice: [R, C] float32, in sigma.

    Given u, both have mean u and are independent, so E[u2 u1^T] = E[u u^T] = I, and projected_grad times u2 is the
    gradient on average.  Trap: one seed for both (as in the authors' code) makes u1 = u2, and I + rounding's variance.
    """
    u = NORMAL_TABLE[random_bits(shape, step, name, DIRECTION)]
    dither = random_bits(shape, step, name, purpose)  # uniform in [0, 1), in units of 2^-16 of a level
    levels = (u * MAX_LEVEL + dither) >> 16  # floor(x + dither): up with probability frac(x), exactly
    return levels * (4 / MAX_LEVEL)  # -7 ... 7, 4/7 sigma apart: no u is beyond, so none is clipped


# ---- 3. A matrix is stored as int8 codes [R, C] and one scale a row [R, 1], which never changes.  A norm's vector
# stays float32, as one row without a scale: all of them together are too small to be worth it.
def quantise(weight):
    """[R, C] float -> (codes, scale), to nearest: this happens once, so no bias adds up.  [C] -> (itself, None)."""
    if weight.ndim == 1:
        return weight[None], None
    scale = weight.abs().amax(1, keepdim=True) / MAX_CODE  # a row of zeros would need a scale too; here is none
    return (weight / scale).round().to(torch.int8), scale


def add_rounded(numbers, scale, delta, bits31):
    """A stored weight plus delta [R, C], landed on its grid (algorithm 1) by stochastic rounding (eq. 5).

    E[SR(x)] = x.  To nearest, each move below half a code would be lost; this way one of a tenth of a code moves every
    tenth weight.  Sign and size are treated apart, because in float32 the fraction of -1e-9 would be 1.
    """
    if scale is None:
        return numbers + delta, None
    size = (delta / scale).abs()
    up = bits31 < ((size - size.floor()) * 2.0**31).long()
    codes = numbers + (size.floor() + up).copysign(delta)
    return codes.clamp(-MAX_CODE, MAX_CODE).to(torch.int8), scale


# ---- 4. The model is a function of the weights and asks for each by its name.  A probe w + eps u1 is only another way
# to read them: one matrix at a time exists in floats, nothing is written, and so there is nothing to restore.
def read_weight(store, step, sign, name):
    """w + eps u1 (sign 1), w - eps u1 (sign -1) or w itself (sign 0), dequantised: [R, C] float32."""
    numbers, scale = store[name]
    weight = numbers if scale is None else numbers * scale
    return weight + sign * EPS * direction(weight.shape, step, name, PROBE_ROUNDING) if sign else weight


def loss(read, config, answers, examples):
    """LLaMA, and the mean cross-entropy of the right one of two answer tokens after each prompt.  read(name) -> w."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(prompt) for prompt, _ in examples], batch_first=True)
    (N, T), D, d = tokens.shape, config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    norm = partial(F.rms_norm, normalized_shape=(D,), eps=config["rms_norm_eps"])
    angle = torch.arange(T)[:, None] * config["rope_theta"] ** -(torch.arange(0, d, 2) / d)  # [T, d/2]
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    x = read("model.embed_tokens.weight")[tokens]  # [N, T, D]
    for layer in (f"model.layers.{i}." for i in range(config["num_hidden_layers"])):
        h = norm(x) * read(f"{layer}input_layernorm.weight")
        q, k, v = ((h @ read(f"{layer}self_attn.{n}_proj.weight").T).view(N, T, -1, d).transpose(1, 2) for n in "qkv")
        q, k = (y * cos + torch.cat((-y[..., d // 2 :], y[..., : d // 2]), -1) * sin for y in (q, k))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)  # so the padding is never seen
        x = x + h.transpose(1, 2).flatten(2) @ read(f"{layer}self_attn.o_proj.weight").T
        h = norm(x) * read(f"{layer}post_attention_layernorm.weight")
        gate, up = (h @ read(f"{layer}mlp.{n}_proj.weight").T for n in ("gate", "up"))
        x = x + (F.silu(gate) * up) @ read(f"{layer}mlp.down_proj.weight").T
    x = norm(x[torch.arange(N), [len(prompt) - 1 for prompt, _ in examples]]) * read("model.norm.weight")  # [N, D]
    logits = x @ read("model.embed_tokens.weight")[answers].T  # [N, 2]; the embedding is the output matrix too
    return F.cross_entropy(logits, torch.tensor([label for _, label in examples])).item()


# ---- 5. The run: algorithm 1 with one query a step.
@torch.no_grad()
def main():
    """Five steps -> their projected gradients, and the store: name -> (codes or float32 numbers, scale or None)."""
    config = json.loads((TINY / "model" / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(TINY / "model" / "tokenizer.json"))
    answers = [tokenizer.encode(word).ids[0] for word in (" terrible", " great")]
    lines = [line.split("\t") for line in (TINY / "train.tsv").read_text().splitlines()[1:]]
    examples = [([config["bos_token_id"], *tokenizer.encode(f"{s} it was").ids], int(label)) for s, label in lines]
    words = random_bits((len(examples), 8), 0, "", DATA_ORDER).to(torch.int16).view(torch.int32).long()
    shuffled = [examples[i] for i in torch.argsort((words[:, 0] << 31) ^ words[:, 1], stable=True)]
    unseen = shuffled[STEPS * BATCH_SIZE :]
    store = {name: quantise(w) for name, w in load_file(TINY / "model" / "model.safetensors").items()}
    before, projected_grads = loss(partial(read_weight, store, 0, 0), config, answers, unseen), []
    for step in range(STEPS):
        batch = shuffled[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        plus = loss(partial(read_weight, store, step, 1), config, answers, batch)
        minus = loss(partial(read_weight, store, step, -1), config, answers, batch)
        projected_grad = (plus - minus) / (2 * EPS)  # one number is all that a step learns
        projected_grads.append(projected_grad)
        lr, changed = LR * (1 - step / STEPS), []
        for name, (numbers, scale) in store.items():  # w <- w - lr * projected_grad * u2, eq. 8 to 10
            delta = -lr * projected_grad * direction(numbers.shape, step, name, UPDATE_ROUNDING)
            bits31 = random_bits(numbers.shape, step, name, WEIGHT_ROUNDING, bits=31)
            store[name] = add_rounded(numbers, scale, delta, bits31)
            changed += [] if scale is None else [(store[name][0] != numbers).flatten()]
        print(f"step {step + 1}: losses {plus:.4f} and {minus:.4f}, projected gradient {projected_grad:+.4f}, "
              f"{torch.cat(changed).double().mean():.1%} of the codes changed")  # fmt: skip
    after = loss(partial(read_weight, store, 0, 0), config, answers, unseen)
    print(f"Ten forward passes and no gradient: the loss of the unseen examples went from {before:.3f} to {after:.3f}.")
    return projected_grads, store


if __name__ == "__main__":
    main()
