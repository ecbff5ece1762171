"""Train a module of your own by zo_optim.zo_step, without a gradient: `python docs/own_module.py`, seconds on a CPU.

First int8 weights along directions of 4 bits (QuZO's q-rge2), then fp32 weights along Gaussian ones (MeZO's).
"""

import sys

import torch
from torch import nn
from torch.func import functional_call

sys.path.insert(0, f"{sys.path[0]}/..")  # the repository is used in place
from quant import StoredWeights, encode  # noqa: E402
from random_bits import Key  # noqa: E402
from zo_optim import ZO, zo_step  # noqa: E402

torch.manual_seed(0)
torch.set_num_threads(1)  # tensors this small gain nothing from a second one
down, labels = torch.tensor([1.0, -1.0]).repeat(4).expand(8, 8), torch.randint(0, 3, (1500,))  # stripes
images = torch.stack((down.T, down, down * down.T))[labels][:, None] + torch.randn(1500, 1, 8, 8)
model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def outputs(view, at):  # logits of each perturbed copy of the weights in the view: [P, N, 3]
    read = {name: view.read(name) for name in view.weights}  # [P, *shape] each
    return torch.stack([functional_call(model, {n: read[n][p] for n in read}, images[at]) for p in range(view.probes)])


def losses(view, at):  # [P]
    return torch.stack([nn.functional.cross_entropy(logits, labels[at]) for logits in outputs(view, at)])


for format, zo in ("int8", ZO(eps=1e-2, bits=4)), ("fp32", ZO(eps=1e-2)):
    weights = {name: encode(p.detach(), format) for name, p in model.named_parameters()}
    stored, unseen = StoredWeights(weights, torch.float32), slice(500, 1500)
    for steps in (0, 400):
        for step in range(steps):
            zo_step(weights, lambda view, k=step % 10 * 50: losses(view, slice(k, k + 50)), Key(0, step), zo, lr=1e-2)
        right = (outputs(stored, unseen)[0].argmax(1) == labels[unseen]).double().mean()
        print(f"{format} after {steps} steps: loss {losses(stored, unseen).item():.3f}, accuracy {right:.3f} (unseen)")
