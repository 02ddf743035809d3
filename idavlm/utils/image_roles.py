"""Roles of images in a sample."""

from enum import IntEnum


class ImageRole(IntEnum):
    """Role of an image. It is set by the data reader, stored in ``image_roles`` and never inferred later.

    Attributes:
        REFERENCE: photo that introduces a named identity ("Kate is <image>").
        SCENE: image of a sample with references, in which these identities are searched.
        GENERAL: image of a sample without references.
    """

    REFERENCE = 0
    SCENE = 1
    GENERAL = 2
