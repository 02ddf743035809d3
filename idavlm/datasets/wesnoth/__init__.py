"""Real art: pictures and records from Battle for Wesnoth, whose package the user's own apt fetches."""

from idavlm.datasets.wesnoth.builder import build_wesnoth

__all__ = ["build_wesnoth"]
