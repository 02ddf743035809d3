"""Compare a run of two processes with the same training in one process."""

from typing import Any

import torch

from tests.distributed.runs import DTYPES

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Largest difference of losses, and of weights relative to the largest change of a weight."""


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """The largest differences of losses, of losses of the evaluation, and of weights.

    Weights that never get a gradient are left out: DeepSpeed decays them, torch does not.
    """
    largest = {"losses": float((found["losses"] - expected["losses"]).abs().max())}
    if "eval" in found:
        assert found["eval"].keys() == expected["eval"].keys()
        largest["eval"] = max(abs(found["eval"][key] - value) for key, value in expected["eval"].items())
    assert found["weights"].keys() == expected["weights"].keys()
    largest["weights"] = max(
        float((found["weights"][name].double() - tensor.double()).abs().max())
        for name, tensor in expected["weights"].items()
        if tensor.numel() and name not in expected["unused"]
    )
    return largest


def fault(strategy: str, found: dict[str, Any], expected: dict[str, Any]) -> str | None:
    """What is wrong with a run; None if nothing is."""
    for result in (expected, found):
        if "error" in result:
            return result["error"]
    if not expected["losses"].abs().min() > 0.1 or len(expected["losses"]) < 4:
        return f"the losses {expected['losses']} show nothing"
    tolerance = TOLERANCES[DTYPES.get(strategy, torch.float64)]
    for name, difference in differences(found, expected).items():
        if not difference <= tolerance:
            return f"{name} differ by {difference:.1e} from those of one process"
    if not found["resumed"]:
        return "the resumed run is not bit-equal"
    return None
