"""Tests of the attention kernels that need no GPU: ahead-of-time compilation, the file of tiles, and flash-attn."""

import argparse
import json
import os
import subprocess
import sys
import time
import types
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from idavlm import cross_attention
from idavlm.ops.cross_attention import flash

pytest.importorskip("triton")

from benchmarks import tile_search
from benchmarks.attention_backends import library
from benchmarks.cross_attention import make_problem
from idavlm.ops.cross_attention.triton import tiling
from idavlm.ops.cross_attention.triton.tiling import GUESSES, KERNELS, Tile, guessed_tiling

ROOT = Path(__file__).parent.parent

SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}
"""Bytes that a program may use, by capability (CUDA programming guide, compute capabilities)."""


@pytest.fixture(scope="module")
def resources(tmp_path_factory):
    """Measured in a separate process, because this one interprets the kernels."""
    file = tmp_path_factory.mktemp("resources") / "resources.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


def test_every_guessed_tile_compiles_for_every_gpu(resources):
    compiled = {(case["kernel"], case["capability"], case["head_dim"], case["dtype"]) for case in resources}
    for capability in (80, 90, 100):
        for kernel in KERNELS:
            for width in GUESSES[80]:
                assert (kernel, capability, width, "bf16") in compiled
            assert {(kernel, capability, width, "fp32") for width in (128, 256)} <= compiled
    # float32 has one tiling for heads of 32 to 128, compiled for 128.
    assert len({guessed_tiling((8, 0), 4, width) for width in (32, 64, 128)}) == 1


def test_kernels_fit_in_shared_memory(resources):
    for case in resources:
        assert case["shared_memory"] <= SHARED_MEMORY[case["capability"]], case


@pytest.mark.skipif(version("triton") < "3.7", reason="the tiles are chosen for Triton 3.7; Triton 3.6 spills in some")
def test_kernels_spill_nothing(resources):
    for case in resources:
        assert case["stack"] == 0, case


def test_matrix_instructions_of_each_gpu(resources):
    """Heads of 256 leave no registers for tiles of all kernels that are large enough."""
    expected = {80: "mma.sync", 90: "wgmma", 100: "tcgen05.mma"}
    for case in resources:
        if case["dtype"] == "bf16" and case["head_dim"] < 256:
            assert case["instruction"] == expected[case["capability"]], case


def test_a_gpu_uses_the_tiles_of_the_highest_capability_below_its_own():
    assert guessed_tiling((8, 9), 2, 64) == GUESSES[80][64]
    assert guessed_tiling((12, 0), 2, 128) == GUESSES[90][128]
    assert guessed_tiling((9, 0), 4, 64) == tiling.FLOAT32_TILING
    with pytest.raises(ValueError, match=r"does not support GPUs of capability 7\.5; it needs 8\.0"):
        guessed_tiling((7, 5), 2, 64)


def test_measured_tiles_are_read_from_the_file_that_was_written(tmp_path):
    measured = GUESSES[90][128]._replace(fwd=Tile(32, 64, 4, 2), fuse_dq=False)
    tilings = {("GPU", 2, 128): measured, ("another", 2, 64): GUESSES[90][64]}
    tiling.save_tilings(tmp_path / "tiles.json", tilings)
    assert tiling.measured_tilings(str(tmp_path / "tiles.json")) == tilings
    assert tiling.measured_tilings(None) == {}


@pytest.mark.parametrize("content", [None, "no json", "{}1", '[{"gpu": "GPU", "itemsize": 2, "width": 64}]'])
def test_an_invalid_file_of_tiles_is_named(tmp_path, content):
    path = tmp_path / "tiles.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"IDAVLM_ATTENTION_TILES=.*tiles\.json cannot be read as a file of tiles"):
        tiling.measured_tilings(str(path))


def test_the_search_finds_the_fastest_tile_of_each_kernel(monkeypatch):
    """Also whether to fuse the gradient of the queries; after the deadline nothing more is measured."""
    wanted = Tile(64, 64, 8, 2)

    def milliseconds_of(kernel, tiling, problems, rounds):
        tile = getattr(tiling, kernel)
        return tiling.fuse_dq + sum(a != b for a, b in zip(tile, wanted, strict=True))

    monkeypatch.setattr(tile_search, "milliseconds_of", milliseconds_of)
    start = GUESSES[80][128]
    todo = list(tile_search.candidates(start))
    best, records = tile_search.fastest_tiling(start, todo, [], 1, deadline=time.monotonic() + 60)
    assert best == (wanted, wanted, wanted, wanted, False)
    assert len(records) == len(todo) + 2
    best, records = tile_search.fastest_tiling(start, todo, [], 1, deadline=0)
    assert best == start._replace(fuse_dq=False)
    assert len(records) == 2


@pytest.fixture
def problems():
    sizes = argparse.Namespace(samples=1, queries=4, patches=9, num_heads=1, head_dim=16)
    sizes.device, sizes.dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32
    return [make_problem(case, sizes) for case in ("pool", "recognise")]


def test_a_tile_is_used_only_if_it_runs_and_its_results_are_right(monkeypatch, problems):
    start = guessed_tiling((9, 0), 4, 32)
    for kernel in KERNELS:
        assert tile_search.reason_to_skip(kernel, start, problems) is None
    assert tile_search.milliseconds_of("bwd_dq_shared", start, problems, rounds=1) > 0

    def with_backend(function):
        monkeypatch.setattr(tile_search, "triton_backend", function)

    with_backend(lambda problem: 2 * library("triton")(problem))
    assert tile_search.reason_to_skip("bwd_dkdv", start, problems) == "AssertionError"

    def raising(message):
        def backend(problem):
            raise RuntimeError(message)

        return backend

    with_backend(raising("PassManager::run failed"))
    assert tile_search.reason_to_skip("fwd", start, problems) == "not compiled"
    with_backend(raising("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tile_search.reason_to_skip("fwd", start, problems)


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
