"""benchmarks/profile.py: kernels are told apart by their names, and phases add up to the step."""

import json

import pytest
import torch
from helpers import tiny_llama, tiny_roberta
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import profile
from benchmarks.memory import examples
from data.scoring import BatchLoss
from model import create
from runtime.config import parse


@pytest.mark.parametrize("name, phase", [
    ("_pair_kernel", "reading the weights"),
    ("_update_kernel", "update"),
    ("nvjet_tst_128x256_64x4_1x2_h_bz_TNT", "products"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "products"),
    ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16>", "products"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int>", "products"),
    ("gemvNSP_kernel", "products"),
    ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
    ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits>", "attention"),
    ("Memcpy HtoD (Pinned -> Device)", "copies"),
    ("Memset (Device)", "copies"),
    ("triton_poi_fused_mul_silu_3", None),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<long>>", None),
    ("aten::bmm", "products"),
    ("aten::scaled_dot_product_attention", "attention"),
    ("aten::addmm_", None),
])  # fmt: skip
def test_names_tell_phases_apart(name, phase):
    assert profile.phase_of(name) == phase


def event(name, start, length, cat="kernel"):
    return {"name": name, "cat": cat, "ts": float(start), "dur": float(length)}


SPAN = event(profile.PROFILED, 100, 400, "user_annotation")


def test_a_gpus_phases_are_those_of_its_kernels_and_idle_time():
    """The host's events do not count, nor kernels of the step before, nor what runs beside another kernel."""
    us = profile.phase_times([
        SPAN, event("_pair_kernel", 50, 20), event("aten::bmm", 110, 300, "cpu_op"),
        event("_pair_kernel", 120, 30), event("nvjet_tst", 150, 100), event("triton_poi_fused", 248, 12),
        event("fmha_cutlassF", 260, 40), event("Memcpy DtoH", 310, 5, "gpu_memcpy"),
        event("_update_kernel", 320, 60), event("other stream", 330, 20), event("late", 500, 10),
    ])  # fmt: skip
    assert us == {"reading the weights": 30, "products": 100, "rest of the forward": 10, "attention": 40, "copies": 5,
                  "update": 60, "idle": 155}  # fmt: skip
    assert us.total() == SPAN["dur"]


def test_a_cpus_phases_are_those_of_the_outermost_operators():
    us = profile.phase_times([
        SPAN, event("ZO.perturbed", 100, 50, "user_annotation"), event("aten::mm", 110, 10, "cpu_op"),
        event("aten::linear", 150, 60, "cpu_op"), event("aten::addmm", 155, 50, "cpu_op"),
        event("aten::scaled_dot_product_attention", 220, 30, "cpu_op"), event("aten::bmm", 225, 20, "cpu_op"),
        event("ZO.add_directions_", 300, 100, "user_annotation"),
    ])  # fmt: skip
    assert us == {"reading the weights": 50, "products": 50, "attention": 30, "update": 100, "rest": 170}


@pytest.mark.parametrize("raw", [tiny_llama(), tiny_roberta()], ids=["llama", "roberta"])
def test_flops_are_those_of_the_blocks_products(raw):
    """Oracle: torch's own count, which leaves out a CPU's attention, less the products after the blocks."""
    lm, T = create(raw), 8
    c = parse(["--model", "tiny", "--batch-size", "4"])
    loss_fn = BatchLoss.of(lm, examples(c, T, 97), 0, 4)
    with FlopCounterMode(display=False) as counter:
        loss_fn(lm.stored_view())
    B, D = 4, 32
    head = 2 * B * D * (2 if raw["model_type"] == "llama" else D + 2)  # two words; RoBERTa's has a dense layer first
    assert profile.product_flops(lm, B, T, 1) == counter.get_total_flops() - head
    assert profile.product_flops(lm, B, T, 6) == 6 * profile.product_flops(lm, B, T, 1)


@pytest.mark.full
def test_the_command_prints_phases_that_add_up(capsys):
    profile.main("--model tiny --device cpu --steps 1".split())
    head, *rows, last = capsys.readouterr().out.splitlines()
    row = json.loads(last)["rows"][0]
    assert head.startswith("QuZO int8, 4 bits, tiny, 16 x 64: ") and len(rows) == len(row["phases"])
    assert set(row["phases"]) == {"reading the weights", "update", "attention", "products", "rest"}
    assert min(row["phases"].values()) > 0 and sum(row["phases"].values()) == pytest.approx(row["ms"])
    assert row["tflop_per_s"] > 0 and not torch.autograd.profiler._is_profiler_enabled
