"""A model and a task for lmms-eval (0.7 or later); an optional dependency.

The model is registered by the entry point ``lmms_eval.models``. Tasks have no entry point; pass their folder:
``python -m lmms_eval --include_path $(python -m idavlm.evaluation.lmms_eval) --tasks idavlm_mmid ...``.
"""
