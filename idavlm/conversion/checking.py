"""Before a byte is written: does every tensor have its place, and every place its tensor?"""

import torch
from torch import Tensor

from idavlm.conversion.errors import ConversionError, listed
from idavlm.conversion.mapping import KeyMap, Transform
from idavlm.conversion.source import Source
from idavlm.models.configuration import IDAVLMConfig
from idavlm.models.modeling import IDAVLMForConditionalGeneration

Work = dict[str, dict[str, Transform | None]]
"""Of a file: names of its tensors to the new names and what is done for each."""


def planned_work(source: Source, key_map: KeyMap, dtype: torch.dtype | None) -> tuple[list[Work], list[dict]]:
    """What each file of ``source`` becomes: the work, and the header of the file to write.

    Raises:
        ConversionError: names that no rule of ``key_map`` knows, or shapes a rule cannot deal with.
    """
    unknown, works, headers = [], [], []
    for file, header in zip(source.files, source.headers, strict=True):
        work: Work = {}
        written: dict[str, Tensor] = {}
        for name, tensor in header.items():
            targets = key_map(name)
            if targets is None:
                unknown.append(name)
                continue
            work[name] = targets
            for target, transform in targets.items():
                try:
                    written[target] = converted(tensor, transform, dtype)
                except (RuntimeError, IndexError, AttributeError) as error:
                    raise ConversionError(f"{name}: shape {tuple(tensor.shape)} cannot become {target}.") from error
        if file.overrides:
            headers = [{name: tensor for name, tensor in earlier.items() if name not in written} for earlier in headers]
        works.append(work)
        headers.append(written)
    if unknown:
        raise ConversionError(f"{source.folder}: tensors that have no place in this format: {listed(unknown)}.")
    return works, headers


def converted(tensor: Tensor, transform: Transform | None, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor if transform is None else transform(tensor)
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def check_complete(source: Source, config: IDAVLMConfig, headers: list[dict[str, Tensor]]) -> None:
    """Compare what would be written with what the model has.

    Raises:
        ConversionError: tensors that are missing, too many, twice there or of another shape, all of them counted.
    """
    expected = model_shapes(config)
    found: dict[str, Tensor] = {}
    twice = []
    for header in headers:
        twice += header.keys() & found.keys()
        found |= header
    tied = {"language_model.lm_head.weight"} if config.text_config.tie_word_embeddings else set()
    missing = expected.keys() - found.keys() - tied
    extra = found.keys() - expected.keys()
    misshaped = {
        f"{name} {tuple(found[name].shape)} instead of {expected[name]}"
        for name in expected.keys() & found.keys()
        if tuple(found[name].shape) != expected[name]
    }
    faults = [("missing", missing), ("extra", extra), ("of another shape", misshaped), ("twice there", twice)]
    if any(names for _, names in faults):
        told = "; ".join(f"{what}: {listed(names)}" for what, names in faults if names)
        raise ConversionError(
            f"{source.folder}: {len(expected)} tensors expected, {len(found)} found, named as in the converted model. "
            f"{told}. Is the checkpoint whole, and does its config.json belong to it?"
        )


def model_shapes(config: IDAVLMConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the model's tensors, without memory for them."""
    with torch.device("meta"):
        state = IDAVLMForConditionalGeneration(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
