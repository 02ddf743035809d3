"""The Wesnoth data set: sprites of the game Battle for Wesnoth, from Debian's package, which apt downloads."""

from idavlm.datasets.wesnoth.builder import build_wesnoth

__all__ = ["build_wesnoth"]
