"""Trained models that are part of the package: their names, and where their files are."""

from os import PathLike
from pathlib import Path

PRETRAINED = ("idavlm-tiny",)
"""Names of the models in this folder."""


def resolve_pretrained(name_or_path: str | PathLike) -> str | PathLike:
    """Return the folder of a model of :data:`PRETRAINED`, and any other name or path unchanged.

    ``from_pretrained`` of idavlm's classes and :func:`idavlm.evaluation.load_checkpoint` call it, so they need no
    network for these names. The Auto classes of transformers do not: pass them ``resolve_pretrained("idavlm-tiny")``.
    As with names on the hub, a folder of this name in the current folder comes first.
    """
    if str(name_or_path) in PRETRAINED and not Path(name_or_path).is_dir():  # Path("idavlm-tiny") is the name, too
        return str(Path(__file__).parent / name_or_path)
    return name_or_path
