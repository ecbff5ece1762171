"""One step of MeZO and of QuZO as their releases take it, written from their descriptions, to time ours beside.

    w += eps u;  plus = L(w);  w -= 2 eps u;  minus = L(w);  w += eps u;  w -= lr g u   (g: the projected gradient)

Both write float weights, in four sweeps over them, and draw u again in every sweep, a tensor at a time from one seed.
MeZO's u is Gaussian, in the weights' dtype.  QuZO's is a float32 Gaussian, quantised and dequantised a tensor at a
time; one rounding serves probe and step (q-rge1); and the weights are floats too, which are fake-quantised after the
update.

There are two of each.  The tight one is spared what a release could be rid of: sums in place, no clamp where nothing
can be clipped, no forward pass after the update, scales that are not searched; so it is faster than the release.  The
other one takes the release's expressions as they stand (w + scale * u * eps makes three temporaries), a clamp and that
forward pass with them, and `transformers`' model, which the releases use.

Imports data.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data.scoring import Batch, BatchLoss

Draw = Callable[[Tensor, torch.Generator], Tensor]  # a weight -> a direction of its shape
LossFn = Callable[[], Tensor]  # at the weights as they are now


def gaussian(w: Tensor, generator: torch.Generator) -> Tensor:
    """MeZO's direction."""
    return torch.normal(0.0, 1.0, w.shape, generator=generator, dtype=w.dtype, device=w.device)


def quantised(w: Tensor, generator: torch.Generator, bits: int = 4) -> Tensor:
    """QuZO's direction, float32."""
    u = torch.normal(0.0, 1.0, w.shape, generator=generator, dtype=torch.float32, device=w.device)
    return fake_quantise(u, bits, generator)


def fake_quantise(x: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """SR(x / step) * step with one step a tensor: x float32 -> the same shape, E = x.

    The largest size is 2^(bits - 1) steps, so there are 2^bits + 1 levels (17 for 4 bits), as in the release.
    """
    step = x.abs().amax() / 2 ** (bits - 1)
    code = x / step
    low = code.floor()
    up = torch.rand(x.shape, generator=generator, device=x.device) < code.sub_(low)  # P(up) is the fraction
    return low.add_(up).mul_(step)


def fake_quantise_as_released(x: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """fake_quantise by the release's own sequence of operations: scale, round, clamp, and back."""
    max_code = 2 ** (bits - 1)
    scale = max_code / x.abs().max()
    scaled = x * scale
    low = scaled.floor()
    up = torch.rand(x.shape, generator=generator, device=x.device) < scaled - low
    code = torch.clamp(low + up.to(x.dtype), -max_code, max_code)
    return code / scale


def quantised_as_released(w: Tensor, generator: torch.Generator, bits: int = 4) -> Tensor:
    u = torch.normal(0.0, 1.0, w.shape, generator=generator, dtype=torch.float32, device=w.device)
    return fake_quantise_as_released(u, bits, generator).to(w.dtype)  # or the sum would be float32


def sweep(weights: list[Tensor], draw: Draw, seed: int, scale: float, length: float) -> None:
    """w += scale * length * u, in place."""
    generator = torch.Generator(weights[0].device).manual_seed(seed)
    for w in weights:
        w.add_(draw(w, generator), alpha=scale * length)


def sweep_as_released(weights: list[Tensor], draw: Draw, seed: int, scale: float, length: float) -> None:
    """w = w + scale * u * length, from left to right."""
    generator = torch.Generator(weights[0].device).manual_seed(seed)
    for w in weights:
        w.data = w.data + scale * draw(w, generator) * length


def step_as_released(weights: list[Tensor], draw: Draw, seed: int, scale: float, length: float, decay=0.0) -> None:
    """w = w - length * (-scale * u + decay * w), the weight decay computed though it is 0."""
    generator = torch.Generator(weights[0].device).manual_seed(seed)
    for w in weights:
        w.data = w.data - length * (-scale * draw(w, generator) + decay * w.data)


@torch.no_grad()
def mezo_step(
    weights: list[Tensor], loss_fn: LossFn, seed: int, eps: float, lr: float, draw: Draw = gaussian,
    released: bool = False,
) -> float:  # fmt: skip
    """Algorithm 1 of MeZO -> the projected gradient.  What three sweeps restore is off by their rounding."""
    perturb, step = (sweep_as_released, step_as_released) if released else (sweep, sweep)
    perturb(weights, draw, seed, 1, eps)
    plus = loss_fn().item()
    perturb(weights, draw, seed, -2, eps)
    minus = loss_fn().item()
    perturb(weights, draw, seed, 1, eps)
    projected_grad = (plus - minus) / (2 * eps)
    step(weights, draw, seed, -projected_grad, lr)
    return projected_grad


@torch.no_grad()
def quzo_step(
    weights: list[Tensor], loss_fn: LossFn, seed: int, eps: float, lr: float, bits: int = 8, released: bool = False
) -> float:
    """The same along 4-bit directions; then matrices are rounded to a grid of `bits` bits.

    (The release does so in one of its two trainers, and by a scale that is a power of two.)
    """
    draw, quantise = (quantised_as_released, fake_quantise_as_released) if released else (quantised, fake_quantise)
    projected_grad = mezo_step(weights, loss_fn, seed, eps, lr, draw, released)
    generator = torch.Generator(weights[0].device).manual_seed(seed + 2**32)  # no step's directions
    for w in weights:
        if w.ndim == 2:
            w.data.copy_(quantise(w.float(), bits, generator))
    if released:
        loss_fn()
    return projected_grad


def last_loss(lm, batch: Batch) -> Tensor:
    """Ours, at the weights as they are stored: logits of the options' words where they are read."""
    return BatchLoss(lm, [batch])(lm.stored_view())[0]


def full_loss(lm, batch: Batch) -> Tensor:
    """The same number computed as the releases do, from logits of every word at every position."""
    logits = lm(batch.tokens)[batch.row, batch.at]  # [B, V]
    return F.cross_entropy(logits[:, batch.words], batch.labels)


def transformers_model(raw: dict, device: str):
    """The releases' model, random weights in bf16, from config.json's contents."""
    from transformers import AutoConfig, AutoModelForCausalLM  # a development extra, for this alone

    config = AutoConfig.for_model(**raw)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def transformers_loss(model, batch: Batch) -> Tensor:
    logits = model(input_ids=batch.tokens, attention_mask=batch.mask).logits[batch.row, batch.at].float()
    return F.cross_entropy(logits[:, batch.words], batch.labels)
