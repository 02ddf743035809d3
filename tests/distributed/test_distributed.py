"""Two processes train as one does, whatever their batches hold. ``make test-distributed`` tries all combinations."""

from importlib.util import find_spec

import pytest

from tests.distributed import cases, runs
from tests.distributed.compare import fault
from tests.distributed.launch import run_cases

CASES = [
    ("DDP", "ID-Former", "mixed"),
    ("FSDP2 by hand", "attached", "mixed"),
    ("FSDP2 by hand", "inner adaptors", "mixed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    cases.draw(folder / "images")
    return folder


@pytest.fixture(scope="module")
def one_process(folder):
    """The same training in one process, with the batches of both."""
    pairs = dict.fromkeys(case[1:] for case in CASES)
    return {pair: runs.run(folder / "-".join(pair), "one process", *pair, folder / "images") for pair in pairs}


@pytest.fixture(scope="module")
def two_processes(folder):
    return run_cases(folder, CASES)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_losses_and_weights_are_those_of_one_process_and_runs_resume_bit_equal(case, one_process, two_processes):
    assert fault(case[0], two_processes[case], one_process[case[1:]]) is None


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed: make test-distributed")
def test_zero_3_runs_the_same_modules_on_every_process(folder):
    case = ("ZeRO-3", "ID-Former", "mixed")
    expected = runs.run(folder / "whole", "one process", *case[1:], folder / "images")
    assert fault(case[0], run_cases(folder, [case])[case], expected) is None
