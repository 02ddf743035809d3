"""Aids for small models that train from scratch in minutes; not part of the stable API."""
