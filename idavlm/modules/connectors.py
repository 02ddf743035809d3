"""Connectors: project image features from the width of the vision tower to that of the language model."""

import re

from torch import nn

from idavlm.modules.resampler import Resampler

_MLP = re.compile(r"mlp([1-9]\d*)x_gelu(_norm)?")


def build_connector(kind: str, *, vision_hidden_size: int, hidden_size: int, **options) -> nn.Module:
    """Build a module that maps image features ``[I, P, Cv]`` to image tokens ``[I, P', C]``.

    - ``"identity"``: ``nn.Identity``; the widths must be equal
    - ``"linear"``: ``Linear`` (LLaVA)
    - ``"mlpNx_gelu"``: N ``Linear`` with GELU between them (LLaVA-1.5, N = 2)
    - ``"mlpNx_gelu_norm"``: N ``Linear`` + ``LayerNorm`` with GELU between them (Yi-VL, N = 2)
    - ``"resampler"``: :class:`Resampler`; ``options`` are its arguments (Qwen-VL)

    The MLPs are ``nn.Sequential`` modules. Their ``state_dict`` keys equal those of the releases below
    ``mm_projector.``.

    Args:
        kind: see above.
        vision_hidden_size: width Cv of the image features.
        hidden_size: width C of the image tokens.
        options: arguments of the resampler, at least ``num_queries`` and ``num_heads``. The other kinds have none.

    Raises:
        ValueError: an unknown ``kind``, unequal widths for ``identity``, or options for a kind without options.
    """
    check_connector("kind", kind)
    if kind == "resampler":
        return Resampler(hidden_size=hidden_size, vision_hidden_size=vision_hidden_size, **options)
    if options:
        raise ValueError(f"connector {kind!r} has no options but got {', '.join(sorted(options))}; leave them out.")
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
    layers: list[nn.Module] = []
    for depth in range(int(match[1])):
        layers += [nn.GELU()] if depth else []
        layers += [nn.Linear(hidden_size if depth else vision_hidden_size, hidden_size)]
        layers += [nn.LayerNorm(hidden_size)] if match[2] else []
    return nn.Sequential(*layers)


def check_connector(name: str, kind: str) -> None:
    """Raise ``ValueError`` unless ``kind``, the value of argument ``name``, is a kind of :func:`build_connector`."""
    if kind not in ("identity", "linear", "resampler") and _MLP.fullmatch(kind) is None:
        raise ValueError(
            f"{name}={kind!r} is not a connector; choose 'identity', 'linear', 'mlp2x_gelu', 'mlp2x_gelu_norm' (any "
            "number for the 2) or 'resampler'."
        )
