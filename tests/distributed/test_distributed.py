"""Two processes train as one does, whatever their batches hold. ``make test-distributed`` tries all combinations."""

import pytest

from tests.distributed import cases, runs
from tests.distributed.compare import fault
from tests.distributed.launch import run_cases

PAIRS = [("ID-Former", "mixed"), ("attached", "mixed"), ("inner adaptors", "mixed")]
CASES = [(strategy, *pair) for strategy in ("DDP", "FSDP2 by hand") for pair in PAIRS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    cases.draw(folder / "images")
    return folder


@pytest.fixture(scope="module")
def one_process(folder):
    """The same training in one process, with the batches of both."""
    return {pair: runs.run(folder / "-".join(pair), "one process", *pair, folder / "images") for pair in PAIRS}


@pytest.fixture(scope="module")
def two_processes(folder):
    return run_cases(folder, CASES)


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_losses_and_weights_are_those_of_one_process_and_runs_resume_bit_equal(case, one_process, two_processes):
    assert fault(case[0], two_processes[case], one_process[case[1:]]) is None
