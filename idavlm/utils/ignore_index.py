"""Label of tokens without loss, the default of ``torch.nn.functional.cross_entropy``."""

IGNORE_INDEX = -100
