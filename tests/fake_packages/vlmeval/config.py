"""The models by name: callables without arguments."""

supported_VLM = {}
