"""The ``idavlm`` program: one file a command."""
