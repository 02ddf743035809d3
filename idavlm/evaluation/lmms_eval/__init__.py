"""A model and a task for lmms-eval (0.7 or later), which is not needed for anything else.

``model.py`` is found by the entry point ``lmms_eval.models``; tasks have none, so that their folder is named:
``python -m lmms_eval --include_path $(python -m idavlm.evaluation.lmms_eval) --tasks idavlm_mmid ...``.
"""
