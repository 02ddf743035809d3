"""Aids for small models that train from scratch in minutes. They are not part of the stable API."""
