"""The ``idavlm`` program; one file per command."""
