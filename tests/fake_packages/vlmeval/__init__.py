"""Interface of VLMEvalKit 0.2."""
