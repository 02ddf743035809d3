"""The target that no loss counts, as in ``torch.nn.functional.cross_entropy``."""

IGNORE_INDEX = -100
