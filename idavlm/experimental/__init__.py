"""Tools for training small models from scratch within minutes. Not part of the stable API."""
