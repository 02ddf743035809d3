"""The role of an image in its sample."""


class ImageRole:
    """The role of an image. The data reader assigns it; batches carry it in ``image_roles``.

    The roles are plain integers, because ``torch.compile`` compares tensors with members of an enumeration wrongly.

    Attributes:
        REFERENCE: introduces a named identity ("Kate is <image>").
        SCENE: an image in which the identities of the sample are to be recognised.
        GENERAL: an image of a sample without references.
    """

    REFERENCE = 0
    SCENE = 1
    GENERAL = 2
