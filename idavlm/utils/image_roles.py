"""What an image is in its sample."""

from enum import IntEnum


class ImageRole(IntEnum):
    """Role of an image, written by the data reader and carried in ``image_roles``; never inferred later.

    REFERENCE: a photo that introduces a named identity ("Kate is <image>").
    SCENE: an image of a sample with references, in which those identities are looked for.
    GENERAL: an image of a sample without references.
    """

    REFERENCE = 0
    SCENE = 1
    GENERAL = 2
