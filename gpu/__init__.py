"""Fast twins of the definitions, for CUDA, put in from outside by train.py and runtime/problem.py alone.

kernels.py and sparse.py: one Triton kernel a tensor; in_place.py: both signs of a sparse probe by one copy of a matrix;
graphs.py: a step's launches recorded once.  These give the bits of their definitions (tests/test_gpu.py), and the same
products but for the order of their sums.  code_products.py multiplies codes by codes, and adapters.py runs a bottleneck
adapter in one kernel, both to the accuracy of their sums.
Without Triton or a GPU, `install`, `probe_in_place` and `estimator` change nothing.
"""

from __future__ import annotations

import importlib.util

import random_bits
import zo_optim
from model import LanguageModel
from zo_optim import ZO, SparseZO, as_kind


def has_triton() -> bool:
    """It comes with CUDA builds of torch for Linux."""
    return importlib.util.find_spec("triton") is not None


def install(lm: LanguageModel) -> None:
    """Draw random bits, dequantise codes, land what no kernel draws and run bottleneck adapters by kernels, where the
    model is on a GPU."""
    if lm.device.type == "cuda" and has_triton():
        from gpu import kernels
        from gpu.adapters import enable_fused_bottlenecks

        random_bits.DEVICE_TWINS["cuda"] = kernels.philox_blocks
        zo_optim.LANDING_TWINS["cuda"] = kernels.land_
        zo_optim.PRODUCT_TWINS["cuda"] = kernels.land_product_
        lm.stored_view_class = kernels.FusedStoredWeights
        lm.fuse_adapters = enable_fused_bottlenecks  # once there are any


def probe_in_place(lm: LanguageModel, zo: SparseZO) -> None:
    """Read both signs of such probes by one copy of a matrix, where the model is on a GPU."""
    if lm.device.type == "cuda" and has_triton():
        from gpu.in_place import enable_probes_in_place

        enable_probes_in_place(lm, zo)


def estimator(zo: ZO, device: str, graphs: bool = False) -> ZO:
    """The same estimator by kernels, and with `graphs` by recorded launches too, where the weights are on a GPU."""
    if not device.startswith("cuda") or not has_triton():
        return zo
    from gpu.graphs import CudaGraphed
    from gpu.kernels import FusedZO, GraphedZO, graphed
    from gpu.sparse import FusedSparseZO, GraphedSparseZO

    graphs = graphs and zo.moves is None  # what launches is then the same at every step
    if type(zo) not in (ZO, SparseZO):  # another direction than those two has no kernel
        return graphed(zo, device) if graphs and zo.graphable else zo
    launched, replayed = (FusedSparseZO, GraphedSparseZO) if isinstance(zo, SparseZO) else (FusedZO, GraphedZO)
    return as_kind(replayed, zo, graphed=CudaGraphed(device)) if graphs else as_kind(launched, zo)
