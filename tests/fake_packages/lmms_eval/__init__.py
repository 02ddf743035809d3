"""Interface of lmms-eval 0.7."""
