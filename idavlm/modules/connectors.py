"""Connectors: from the vision tower's width to the language model's."""

import re

from torch import nn

from idavlm.modules.resampler import Resampler

_MLP = re.compile(r"mlp([1-9]\d*)x_gelu(_norm)?")


def build_connector(kind: str, *, vision_hidden_size: int, hidden_size: int, **options) -> nn.Module:
    """Build the module that takes ``[I, P, Cv]`` image features to ``[I, P', C]``.

    ==================== ====================================================== =========================
    ``kind``             computes                                               source
    ==================== ====================================================== =========================
    ``identity``         nothing; the widths must be equal
    ``linear``           ``Linear``                                             LLaVA
    ``mlpNx_gelu``       N ``Linear``, GELU between them                        LLaVA-1.5 (N = 2)
    ``mlpNx_gelu_norm``  N ``Linear`` + ``LayerNorm``, GELU between them        Yi-VL (N = 2)
    ``resampler``        :class:`Resampler`; ``options`` are its arguments      Qwen-VL
    ==================== ====================================================== =========================

    The ``state_dict`` keys of the MLPs are those of the releases below ``mm_projector.``: layers numbered in a
    ``nn.Sequential``.

    Args:
        kind: as above.
        vision_hidden_size: Cv.
        hidden_size: C.
        options: for the resampler, at least ``num_queries`` and ``num_heads``.

    Raises:
        ValueError: an unknown ``kind``, widths that differ for ``identity``, options where there are none.
    """
    if kind == "resampler":
        return Resampler(hidden_size=hidden_size, vision_hidden_size=vision_hidden_size, **options)
    if options:
        raise ValueError(f"connector {kind!r} takes no options but got {', '.join(sorted(options))}; leave them out.")
    if kind == "identity":
        if vision_hidden_size != hidden_size:
            raise ValueError(
                f"connector 'identity' needs equal widths, but vision_hidden_size={vision_hidden_size} and "
                f"hidden_size={hidden_size}; choose 'linear'."
            )
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(vision_hidden_size, hidden_size)
    match = _MLP.fullmatch(kind)
    if match is None:
        raise ValueError(
            f"kind={kind!r} is no connector; choose 'identity', 'linear', 'mlp2x_gelu', 'mlp2x_gelu_norm' (any number "
            "for the 2) or 'resampler'."
        )
    layers: list[nn.Module] = []
    for depth in range(int(match[1])):
        layers += [nn.GELU()] if depth else []
        layers += [nn.Linear(hidden_size if depth else vision_hidden_size, hidden_size)]
        layers += [nn.LayerNorm(hidden_size)] if match[2] else []
    return nn.Sequential(*layers)
