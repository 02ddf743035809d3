"""Language models on packed rows: what they need, and the check that no token attends to another sample."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.utils.generic import is_flash_attention_requested

from idavlm._compat import cache_name, loses_image_blocks
from idavlm.data.packing import tokens_of_samples, unpack
from idavlm.modules.inner_adaptor.decoder import find_decoder_parts

_REMEDY = "train it without packing (packing=False)"
_CHECKED: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""Decoders whose layers were checked, with their attention implementation."""


def check_packable(model: PreTrainedModel, *, max_length: int | None) -> None:
    """Refuse language models that cannot process packed rows, as far as their classes say so.

    :func:`packed_rows` checks the rest when the first packed rows are computed.

    Args:
        model: a language model or an image-text model of transformers.
        max_length: largest number of tokens of a row, None if all samples of a batch are in one row.

    Raises:
        ValueError: the message names the class and the reason.
    """
    decoder = model.get_decoder()
    name = type(decoder).__name__
    if loses_image_blocks(model):
        raise ValueError(
            f"packing: in packed rows, transformers loses the attention between the tokens of an image in the "
            f"sliding-window layers of {type(model).__name__}; {_REMEDY}."
        )
    if getattr(decoder, "_is_stateful", False):
        raise ValueError(
            f"packing: {name} has recurrent layers, whose state would pass from one sample to the next; {_REMEDY}."
        )
    if "position_ids" not in inspect.signature(decoder.forward).parameters:
        raise ValueError(
            f"packing: {name} takes no position_ids, so positions cannot start again with each sample; {_REMEDY}."
        )
    if max_length is not None and _uses_flash(decoder):
        raise ValueError(
            f"max_length={max_length}: with attn_implementation={decoder.config._attn_implementation!r}, transformers "
            "recognises packed samples in a single row only; leave max_length out."
        )


@contextmanager
def packed_rows(
    model: PreTrainedModel, token_sample_index: Tensor | None, arguments: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Within the block, check that each layer of the language model keeps the samples apart, the first time it runs.

    transformers derives the mask of packed rows from ``position_ids``, if a model passes them on and has no cache. A
    model that does not would let tokens attend to other samples without an error.

    Args:
        model: a language model or an image-text model of transformers.
        token_sample_index: ``[R, L]`` sample of each token; None for rows that are not packed: nothing is checked.
        arguments: arguments of the model.

    Yields:
        Further arguments for the model. The cache is switched off.

    Raises:
        ValueError: arguments or a language model that cannot be combined with packed rows; or, within the block, a
            layer gets no mask, or one that lets samples attend to one another. The message names the layer.
    """
    if token_sample_index is None:
        yield {}
        return
    if arguments.get("position_ids") is None:
        raise ValueError("token_sample_index needs position_ids, which start again with each sample.")
    for name in ("attention_mask", "cache", "past_key_values", "use_cache"):
        if arguments.get(name) is not None and arguments[name] is not False:
            raise ValueError(f"{name} cannot be combined with token_sample_index; leave it out.")
    check_packable(model, max_length=None if len(token_sample_index) == 1 else token_sample_index.shape[1])
    with _checked_layers(model.get_decoder(), token_sample_index):
        yield {"use_cache": False}


def packed_positions(model: PreTrainedModel, token_sample_index: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """The ``position_ids`` of an image-text model of transformers for packed rows.

    Models with positions in three dimensions (M-RoPE) compute them for each sample from its images.

    Args:
        model: the model.
        token_sample_index: ``[R, L]`` sample of each token.
        arguments: the other arguments of the model, with ``position_ids`` ``[R, L]`` within each sample.
    """
    compute = getattr(model.base_model, "compute_3d_position_ids", None)
    if compute is None or arguments.get("position_ids") is None:
        return arguments.get("position_ids")
    return _positions_with_mrope(compute, token_sample_index, arguments)


def _positions_with_mrope(compute: Callable, token_sample_index: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """``[4, R, L]``: positions within the samples, then the three dimensions that the model computes."""
    position_ids = arguments["position_ids"]
    if arguments.get("input_ids") is None:
        raise ValueError("packed rows need input_ids, from which the positions of images are computed.")
    tokens = tokens_of_samples(token_sample_index)
    given = {
        **arguments,
        "input_ids": unpack(arguments["input_ids"], tokens, 0),
        "attention_mask": (tokens >= 0).long(),
        "inputs_embeds": None,
        cache_name(): None,
    }
    if arguments.get("mm_token_type_ids") is not None:
        given["mm_token_type_ids"] = unpack(arguments["mm_token_type_ids"], tokens, 0)
    names = inspect.signature(compute).parameters
    of_samples = compute(**{name: given.get(name) for name in names})
    if of_samples is None:  # no image
        return position_ids.expand(4, *position_ids.shape)
    rows = position_ids.expand(3, *position_ids.shape).flatten(1).clone()
    rows[:, tokens[tokens >= 0]] = of_samples[:, tokens >= 0]
    return torch.cat([position_ids[None], rows.view(3, *position_ids.shape)])


@contextmanager
def _checked_layers(decoder: PreTrainedModel, token_sample_index: Tensor) -> Iterator[None]:
    implementation = decoder.config._attn_implementation
    if _CHECKED.get(decoder) == implementation or not (token_sample_index != token_sample_index[:, :1]).any():
        yield
        return
    seen = []

    def check(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if _uses_flash(decoder):
            is_apart = _starts_with_samples(kwargs.get("position_ids"), token_sample_index)
        else:
            is_apart = any(_separates(value, token_sample_index) for value in (*args, *kwargs.values()))
        if not is_apart:
            raise ValueError(
                f"packing: the layer {type(layer).__name__} of {type(decoder).__name__} is not told which tokens of a "
                f"row belong to one sample, so samples would see one another; {_REMEDY}."
            )
        seen.append(layer)

    hooks = [layer.register_forward_pre_hook(check, with_kwargs=True) for layer in _layers(decoder)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if seen:
        _CHECKED[decoder] = implementation


def _uses_flash(decoder: nn.Module) -> bool:
    return is_flash_attention_requested(decoder.config)


def _layers(decoder: nn.Module) -> list[nn.Module]:
    try:
        return list(find_decoder_parts(decoder).layers)
    except ValueError as error:
        number = decoder.config.num_hidden_layers
        raise ValueError(
            f"packing: the {number} layers of {type(decoder).__name__} are not found; {_REMEDY}."
        ) from error


def _separates(mask: Any, token_sample_index: Tensor) -> bool:
    """Whether ``mask`` is an attention mask of whole rows in which no token attends to another sample."""
    rows, length = token_sample_index.shape
    if isinstance(mask, BlockMask):
        row = torch.arange(rows, device=token_sample_index.device)[:, None, None]
        token = torch.arange(length, device=token_sample_index.device)
        allowed = mask.mask_mod(row, torch.zeros_like(row), token[:, None], token)[:, None]
    elif isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-2:] == (length, length):
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    else:
        return False
    index = token_sample_index.to(allowed.device)
    is_other = index[:, None, :, None] != index[:, None, None, :]
    return not (allowed & is_other).any()


def _starts_with_samples(position_ids: Any, token_sample_index: Tensor) -> bool:
    """Whether flash attention in transformers finds the samples: by positions of 0 in a single row."""
    if not isinstance(position_ids, Tensor) or position_ids.shape != token_sample_index.shape or len(position_ids) != 1:
        return False
    starts = token_sample_index[0].diff(prepend=token_sample_index.new_full((1,), -2)) != 0
    return torch.equal(position_ids[0] == 0, starts)
