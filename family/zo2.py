"""ZO2: models larger than the GPU, whose blocks are in host memory (Wang et al., "ZO2: Scalable Zeroth-Order
Fine-Tuning for Extremely Large Language Models with Limited GPU Memory", arXiv 2503.12668, github.com/liangyuwang/zo2).

Of the blocks three are on the GPU: one computes while the next is copied there and the last one back, each on a stream
of its own.  The step t - 1 is taken in a block when it arrives for the forward of step t, so that a step brings each
block across once each way, instead of twice.  Embedding, final norm and head stay on the GPU.

    block i, step t:   arrive;   w <- round(w - lr / Q sum g u2) of step t - 1;   L(w + eps u1), L(w - eps u1);   leave

That much is the paper's and its code's.  Ours:
- A block is copied as its codes, in int4 an eighth of the bytes of fp32; a probe reads them, and nothing is restored.
- A block leaves only if a step was taken in it: in evaluations and in further forwards of a step none does.
- A step that is pending is (seed, step), Q factors and names: no state of a random generator is kept.

Everything that is drawn and rounded is keyed, so that the weights have the bits of the run that keeps all on the GPU.
A step's counts are those of what was written during it: in blocks, of the step before.

Shape key: Q queries.  Imports model, quant, random_bits and zo_optim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model import LanguageModel, View
from quant import COUNTED, Store
from random_bits import Key
from zo_optim import ZO

Stores = dict[str, Store]


class Lane:
    """Copies in an order of their own, beside the computing: by a CUDA stream; on a CPU at once."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, to: Stores, of: Stores, after: list[torch.cuda.Event | None]) -> torch.cuda.Event | None:
        """-> the event that they are made; begun after others.  to and of have the same tensors in the same order."""
        both = zip(to.values(), of.values(), strict=True)
        pairs = [pair for store, other in both for pair in zip(tensors(store), tensors(other), strict=True)]
        if self.stream is None:
            for there, here in pairs:
                there.copy_(here)
            return None
        for event in after:
            if event is not None:
                self.stream.wait_event(event)
        with torch.cuda.stream(self.stream):
            for there, here in pairs:
                there.copy_(here, non_blocking=True)
            return self.stream.record_event()


@dataclass(eq=False)
class Slot:
    """Room for one block on the device."""

    stores: list[Store]
    block: int | None = None  # which is there, or on its way
    arrived: torch.cuda.Event | None = None
    used: torch.cuda.Event | None = None  # its forward is done
    returned: torch.cuda.Event | None = None  # it is copied back


class Offloaded:
    """The blocks of a model in host memory, and the three that are on the device.  It stands in for lm.apply.

    While a block's forward runs, lm.weights has the stores on the device in place of those at home.  `offload` makes
    one.
    """

    def __init__(self, lm: LanguageModel, device: torch.device, home: list[Stores]):
        """home: each block's stores in host memory, which lm.weights has too."""
        self.lm, self.device, self.run, self.home = lm, device, lm.apply, home
        self.block_of = {name: block for block, stores in enumerate(home) for name in stores}
        self.slots = [Slot([moved(store, lambda x: torch.empty_like(x, device=device)) for store in
                            home[0].values()]) for _ in range(3)]  # fmt: skip
        for slot in self.slots:
            slot.used = self.now()  # its memory may still be in use by what the GPU was given before
        self.current, self.up, self.down = self.slots[0], Lane(device), Lane(device)
        self.returned: dict[int, torch.cuda.Event | None] = {}  # by block: its home has been written
        self.pending: dict[int, list[str]] = {}  # by block: the names in which the last step has yet to be taken
        self.last: tuple[ZO, Tensor, Key] | None = None  # that step
        self.counts = torch.zeros(COUNTED, dtype=torch.int64, device=device)  # of what was pending, since the last step

    def apply(self, part: nn.Module, prefix: str, view: View, x: Tensor, *context) -> Tensor | tuple[Tensor, Tensor]:
        """LanguageModel.apply, of a block once it is there."""
        if part is not self.lm.block:
            return self.run(part, prefix, view, x, *context)
        with self.present(int(prefix.removeprefix(self.lm.layers).rstrip("."))):
            return self.run(part, prefix, view, x, *context)

    @contextmanager
    def present(self, block: int) -> Iterator[None]:
        """A block on the device, where the last step is taken in it if it is pending; the next one is on its way."""
        slot, home = self.bring(block), self.home[block]
        self.current = slot
        if slot.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(slot.arrived)
        here, names = dict(zip(home, slot.stores, strict=True)), self.pending.pop(block, [])
        try:
            self.lm.weights.update(here)
            if names:
                zo, factors, key = self.last
                self.counts += zo.add_directions_({name: here[name] for name in names}, factors, key)
            self.bring((block + 1) % len(self.home))
            yield
        finally:  # also where memory is out
            slot.used = self.now()
            if names:  # not before: a sparse probe moves weights where they are stored, and back
                slot.returned = self.returned[block] = self.down.copy(home, here, [slot.used])
            self.lm.weights.update(home)

    def bring(self, block: int) -> Slot:
        """The slot that holds a block; if none does, the one that was used longest ago, to which it is on its way."""
        for slot in self.slots:
            if slot.block == block:
                return slot
        slot = self.slots[(self.slots.index(self.current) + 1) % len(self.slots)]
        there = dict(zip(self.home[block], slot.stores, strict=True))
        slot.block, after = block, [slot.used, slot.returned, self.returned.get(block)]
        slot.arrived = self.up.copy(there, self.home[block], after)
        return slot

    def now(self) -> torch.cuda.Event | None:
        cuda = self.device.type == "cuda"
        return torch.cuda.current_stream(self.device).record_event() if cuda else None

    def defer(self, zo: ZO, weights: Stores, factors: Tensor, key: Key) -> Tensor:
        """zo.add_directions_, of blocks when they are next on the device -> counts of what has been written."""
        self.take_pending()  # where no forward came in between
        counts = zo.add_directions_({n: store for n, store in weights.items() if n not in self.block_of}, factors, key)
        counts, self.counts = counts + self.counts, torch.zeros_like(self.counts)
        self.last = zo, factors, key
        for name in weights:
            if name in self.block_of:
                self.pending.setdefault(self.block_of[name], []).append(name)
        return counts

    def take_pending(self) -> None:
        for block in sorted(self.pending):
            with self.present(block):
                pass

    def free(self) -> None:
        """Let go of all memory, when no copy is on its way."""
        for lane in (self.up, self.down):
            if lane.stream is not None:
                lane.stream.synchronize()
        self.home.clear()
        self.slots.clear()

    def settle(self) -> None:
        """All steps are taken and at home: before weights are saved, hashed or compared."""
        self.take_pending()
        if self.down.stream is not None:
            self.down.stream.synchronize()


def offload(lm: LanguageModel, device: torch.device) -> Offloaded:
    """Put a model's blocks into host memory and the rest of it on the device, in place -> lm.offloaded.

    Raises ValueError for adapters, which are one tensor of all blocks, and for blocks that are not alike.
    """
    names = [[name for name in lm.weights if name.startswith(f"{lm.layers}{block}.")]
             for block in range(lm.config.num_hidden_layers)]  # fmt: skip
    alike = len({tuple(name.partition(f"{i}.")[2] for name in sorted(of)) for i, of in enumerate(names)}) == 1
    if lm.adapters is not None or not alike:
        raise ValueError("only a model's own blocks can be offloaded, all of the same tensors")
    order = list(lm.weights)  # in which weights are hashed and saved
    home = [{name: moved(lm.weights.pop(name), at_home(device)) for name in sorted(of)}
            for of in names]  # fmt: skip (popped, or the host would hold all of them twice)
    stores = {name: moved(store, lambda x: x.to(device)) for name, store in lm.weights.items()}
    for of_block in home:
        stores |= of_block
    lm.weights = {name: stores[name] for name in order}
    lm.offloaded = Offloaded(lm, device, home)
    lm.device, lm.apply = device, lm.offloaded.apply
    return lm.offloaded


class Deferred:
    """An estimator whose steps offloaded blocks take when they are next on the device; all else is the inner's."""

    def __init__(self, zo: ZO, offloaded: Offloaded):
        self.zo, self.offloaded = zo, offloaded

    def __getattr__(self, name: str):
        if name == "zo":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.zo, name)

    def add_directions_(self, weights: Stores, factors: Tensor, key: Key) -> Tensor:
        return self.offloaded.defer(self.zo, weights, factors, key)


def tensors(store: Store) -> list[Tensor]:
    """All that a store keeps, scales included, in a fixed order."""
    values = (getattr(store, f.name) for f in dataclasses.fields(store))
    return [value for value in values if isinstance(value, Tensor)]


def moved(store: Store, change: Callable[[Tensor], Tensor]) -> Store:
    """The same store of other tensors."""
    values = {f.name: getattr(store, f.name) for f in dataclasses.fields(store)}
    return dataclasses.replace(store, **{name: change(x) for name, x in values.items() if isinstance(x, Tensor)})


def at_home(device: torch.device) -> Callable[[Tensor], Tensor]:
    """A tensor's copy in host memory, which a GPU can read beside its work only where it is pinned."""
    return (lambda x: x.cpu().pin_memory()) if device.type == "cuda" else (lambda x: x.to("cpu", copy=True))
