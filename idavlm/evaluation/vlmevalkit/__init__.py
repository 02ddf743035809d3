"""A model and data sets for VLMEvalKit (package ``vlmeval``, or its distribution ``ms-vlmeval``); optional.

VLMEvalKit has no entry points. ``python -m idavlm.evaluation.vlmevalkit`` registers the model ``idavlm`` and a data set
for each task of ``idavlm eval`` (``idavlm_mmid``, ``idavlm_rap``, ...), and passes its arguments on to VLMEvalKit.
"""
