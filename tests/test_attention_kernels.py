"""Tests of the attention kernels that need no GPU: ahead-of-time compilation, the file of tiles, and flash-attn."""

import argparse
import json
import os
import subprocess
import sys
import types
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from idavlm import cross_attention
from idavlm.ops.cross_attention import flash

pytest.importorskip("triton")

from benchmarks import tune_attention
from benchmarks.attention_backends import library
from benchmarks.cross_attention import make_problem
from idavlm.ops.cross_attention.triton import tiling
from idavlm.ops.cross_attention.triton.tiling import (
    DEFAULT_TILINGS,
    TMA_TILINGS,
    Tile,
    default_tiling,
    default_tma_tiling,
)

ROOT = Path(__file__).parent.parent

SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}
"""Bytes that a program may use, by capability (CUDA programming guide, compute capabilities)."""


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """Measured in a separate process, because this one interprets the kernels."""
    file = tmp_path_factory.mktemp("resources") / "resources.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def test_every_default_tiling_compiles_for_every_gpu(resources):
    """Tensor descriptors are tested for head_dim 128 and 256; ``docs/kernels.md`` has the figures of the others."""
    compiled = {
        (case["kernel"], case["capability"], case["head_dim"], case["dtype"]) for case in resources if not case["tma"]
    }
    assert {case["capability"] for case in resources} == {80, 90, 100}
    for capability, itemsize, width in DEFAULT_TILINGS:
        if itemsize == 4 and width < 128:
            assert DEFAULT_TILINGS[capability, 4, width] == DEFAULT_TILINGS[capability, 4, 128], (
                "this tiling needs to be compiled too"
            )
            continue
        for kernel in kernels_of(DEFAULT_TILINGS[capability, itemsize, width]):
            assert (kernel, capability, width, "fp32" if itemsize == 4 else "bf16") in compiled
    with_tma = {(case["capability"], case["head_dim"], case["kernel"]) for case in resources if case["tma"]}
    for (capability, width), tma_tiling in TMA_TILINGS.items():
        if width >= 128:
            assert {(capability, width, kernel) for kernel in kernels_of(tma_tiling)} <= with_tma


def kernels_of(some_tiling: tiling.Tiling) -> list[str]:
    return [*tiling.KERNELS, *(kernel for kernel in tiling.OPTIONAL_KERNELS if getattr(some_tiling, kernel))]


def test_kernels_fit_in_shared_memory(resources):
    for case in resources:
        assert case["shared_memory"] <= SHARED_MEMORY[case["capability"]], case


@pytest.mark.skipif(version("triton") < "3.7", reason="the tiles are chosen for Triton 3.7; Triton 3.6 spills in some")
def test_kernels_spill_nothing(resources):
    for case in resources:
        assert case["stack"] == 0, case


def test_matrix_instructions_of_each_gpu(resources):
    for case in resources:
        if case["dtype"] == "bf16" and case["capability"] == 90:
            assert case["instruction"] == "wgmma", case
        if case["tma"] and case["capability"] == 100:
            assert case["instruction"] == "tcgen05.mma", case


def test_descriptors_and_load_only_warps_are_compiled(resources):
    """Only kernels with ``tma`` use bulk copies in their PTX, and only warp-specialized kernels have more warps."""
    for case in resources:
        assert case["tma"] == Tile(*case["tile"]).tma, case
        assert (case["num_warps"] > Tile(*case["tile"]).num_warps) == (case["kernel"] == "fwd_warp_specialized"), case


def test_a_gpu_uses_the_tiles_of_the_highest_capability_below_its_own():
    assert default_tiling((8, 9), 2, 64) == DEFAULT_TILINGS[80, 2, 64]
    assert default_tiling((12, 0), 4, 128) == DEFAULT_TILINGS[100, 4, 128]
    with pytest.raises(ValueError, match=r"does not support GPUs of capability 7\.5; it needs 8\.0"):
        default_tiling((7, 5), 2, 64)
    assert default_tma_tiling((8, 9), 64) is None
    assert default_tma_tiling((12, 0), 64) == TMA_TILINGS[100, 64]


@pytest.fixture
def tuning_file(monkeypatch, tmp_path):
    monkeypatch.setenv("IDAVLM_TUNING_CACHE", str(tmp_path / "folder" / "tiles.json"))
    tiling.measured_tilings.cache_clear()
    yield tmp_path / "folder" / "tiles.json"
    tiling.measured_tilings.cache_clear()


def test_measured_tiles_outlive_the_process(tuning_file):
    assert tiling.measured_tilings("GPU") == {}
    saved = TMA_TILINGS[90, 128]._replace(fwd=Tile(32, 64, 4, 2), fuse_dq=False, bwd_dv=Tile(64, 32, 8, 2, tma=True))
    tiling.save_tiling("GPU", 2, 128, DEFAULT_TILINGS[90, 2, 128])
    tiling.save_tiling("GPU", 2, 128, saved)
    tiling.save_tiling("another", 2, 64, DEFAULT_TILINGS[90, 2, 64])
    assert tiling.measured_tilings("GPU") == {(2, 128): saved}
    assert [path.name for path in tuning_file.parent.iterdir()] == ["tiles.json"]


@pytest.mark.parametrize("content", ["no json", "[]", '{"GPU, triton VERSION": {"2 64": {"fwd": [1]}}}'])
def test_an_invalid_file_of_tiles_is_named(tuning_file, content):
    import triton

    tuning_file.parent.mkdir()
    tuning_file.write_text(content.replace("VERSION", triton.__version__))
    with pytest.raises(ValueError, match=r"tiles\.json cannot be read as a file of tiles .*; delete it"):
        tiling.measured_tilings("GPU")


def test_the_tuner_finds_the_fastest_tiling_that_runs():
    wanted = Tile(64, 32, 8, 3)

    def time_of(field, tiling):
        if field == "fuse_dq":
            return 1.0 + tiling.fuse_dq
        if field == "bwd_dv":
            return 1.0 + (tiling.bwd_dv is not None)
        tile = getattr(tiling, field)
        return None if tile.num_warps == 4 else 1.0 + sum(a != b for a, b in zip(tile, wanted, strict=True))

    best = tune_attention.tune(DEFAULT_TILINGS[90, 2, 128], None, time_of)
    assert best == (wanted, wanted, wanted, wanted, False, None, None)
    assert tune_attention.tune(best, None, lambda field, tiling: None) == best


def test_the_tuner_measures_tensor_descriptors_where_they_are_supported():
    default, tma_tiling = DEFAULT_TILINGS[90, 2, 128], TMA_TILINGS[90, 128]
    measured = []

    def time_of(field, tiling):
        measured.append((field, tiling))
        return 1.0 + sum(getattr(tiling, name) != value for name, value in tma_tiling._asdict().items())

    assert tune_attention.tune(default, tma_tiling, time_of) == tma_tiling
    assert ("fwd_warp_specialized", tma_tiling._replace(fwd_warp_specialized=None)) in measured
    assert not measured[0][1].fwd.tma


def test_the_tuner_skips_tiles_that_triton_cannot_lower(monkeypatch):
    sizes = argparse.Namespace(samples=1, queries=4, patches=9, num_heads=1, head_dim=16)
    sizes.device, sizes.dtype = torch.device("cpu"), torch.float32
    time_of = tune_attention.timer({"pool": make_problem("pool", sizes)}, rounds=1)

    def raising(message):
        def backend(problem):
            raise RuntimeError(message)

        monkeypatch.setattr(tune_attention, "triton_backend", backend)

    raising("PassManager::run failed")
    assert time_of("fwd", DEFAULT_TILINGS[90, 2, 32]) is None
    raising("CUDA error: an illegal memory access was encountered")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        time_of("fwd", DEFAULT_TILINGS[90, 2, 32])


def test_the_tuner_checks_and_times_a_tiling(monkeypatch):
    """The kernels are interpreted. The times are not asserted, only that wrong results are rejected."""
    monkeypatch.setattr(tune_attention, "triton_backend", library("triton"))
    sizes = argparse.Namespace(samples=1, queries=4, patches=9, num_heads=1, head_dim=16)
    sizes.device, sizes.dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32
    default = DEFAULT_TILINGS[90, 4, 32]
    time_of = tune_attention.timer({"pool": make_problem("pool", sizes)}, rounds=1)
    assert time_of("fwd", default) > 0
    assert time_of("bwd_dq_shared", default) > 0
    monkeypatch.setattr(tune_attention, "triton_backend", lambda problem: 2 * library("triton")(problem))
    assert time_of("bwd_dkdv", default) is None


def fake_varlen(q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, deterministic):
    """Computes what flash_attn_varlen_func is documented to compute, with its checks."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert all(x.dim() == 3 for x in (q, k, v))
    assert max_q == max(cu_q.diff()) and max_k == max(cu_k.diff())  # noqa: PT018
    out = torch.zeros_like(q)
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True):
        weights = torch.einsum("qhd,khd->hqk", q[q0:q1] * softmax_scale, k[k0:k1]).softmax(-1)
        out[q0:q1] = torch.einsum("hqk,khd->qhd", weights, v[k0:k1])
    return out


@pytest.mark.parametrize("shared", [False, True])
def test_flash_attention_gets_packed_segments(monkeypatch, shared):
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=fake_varlen))
    monkeypatch.setattr(flash, "_check", lambda q: None)
    q = torch.randn(4, 2, 8) if shared else torch.randn(3, 4, 2, 8)
    k, v = torch.randn(2, 9, 2, 8)
    options = {"cu_seqlens_k": torch.tensor([0, 2, 2, 9]), "key_bias": torch.randn(3, 2, 8), "scale": 0.3}
    options |= {"output_attentions": True, "key_groups": torch.arange(9) % 2, "num_key_groups": 2}
    for found, expected in zip(
        cross_attention(q, k, v, **options, attn_implementation="flash_attention_2"),
        cross_attention(q, k, v, **options, attn_implementation="eager"),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_missing_flash_attention_names_the_extra(monkeypatch):
    x = torch.zeros(1, 2, 1, 32)
    with pytest.raises(ValueError, match=r"needs a CUDA GPU, but q is on cpu; use attn_implementation='sdpa'"):
        cross_attention(x, x, x, attn_implementation="flash_attention_2")
    monkeypatch.setattr(flash, "_check", lambda q: None)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ImportError, match=r"pip install 'idavlm\[flash-attn\]'"):
        cross_attention(x, x, x, attn_implementation="flash_attention_2")
