"""The folder in which downloaded packages stay: ``$IDAVLM_CACHE``, or ``~/.cache/idavlm``."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder ``name`` of the cache, made if need be."""
    root = os.environ.get("IDAVLM_CACHE")
    folder = (Path(root) if root else Path.home() / ".cache" / "idavlm") / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
