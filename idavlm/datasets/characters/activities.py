"""Activities of characters: the pose, the object that is used, and the words for it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Activity:
    """A pose and an object.

    ``hands`` are (left, right) as seen in the image, relative to the centre of the shoulders, in arm lengths. ``feet``
    are relative to the centre of the hips, in leg lengths. x points right and y down. ``knees`` and ``elbows`` (left,
    right) are the sides they bend to, -1 or 1.
    """

    name: str
    """Text that follows "is" in "Kate is ...": "waving", "carrying a box"."""
    hands: tuple[tuple[float, float], tuple[float, float]] = ((-0.66, 0.95), (0.66, 0.95))
    feet: tuple[tuple[float, float], tuple[float, float]] = ((-0.3, 1.0), (0.3, 1.0))
    elbows: tuple[int, int] = (1, -1)
    knees: tuple[int, int] = (1, -1)
    lean: float = 0.0
    """Angle of the torso to the right, in degrees."""
    lift: float = 0.0
    """Height above the ground, in leg lengths."""
    look: float = 0.0
    """Direction of the face: -1 left, 0 straight, 1 right."""
    gaze_down: bool = False
    prop: str = ""
    """Object that is held or used: a key of ``props.PROPS``; empty for none."""
    loose: float = 0.08
    """Random displacement of the hands between images, in arm lengths; 0 if they hold an object."""


ACTIVITIES: tuple[Activity, ...] = (
    Activity("waving", hands=((-0.68, 0.95), (1.15, -0.62)), elbows=(1, 1), loose=0.16),
    Activity("reading", hands=((-0.36, 0.72), (0.36, 0.72)), gaze_down=True, prop="book", loose=0),
    Activity("drinking tea", hands=((-0.75, 0.7), (0.3, 0.0)), prop="cup", loose=0),
    Activity(
        "running",
        hands=((-0.95, 0.45), (1.0, 0.3)),
        feet=((-0.85, 0.55), (0.72, 0.7)),
        elbows=(1, 1),
        knees=(-1, -1),
        lean=10,
        lift=0.05,
        look=1,
    ),
    Activity(
        "sitting",
        hands=((0.0, 0.95), (0.6, 0.95)),
        feet=((0.5, 0.62), (0.72, 0.6)),
        knees=(-1, -1),
        prop="stool",
        look=0.6,
    ),
    Activity(
        "jumping", hands=((-1.1, -0.6), (1.1, -0.6)), elbows=(-1, 1), feet=((-0.55, 0.82), (0.62, 0.52)), lift=0.5
    ),
    Activity("carrying a box", hands=((-0.6, 0.82), (0.6, 0.82)), prop="box", loose=0),
    Activity(
        "kicking a ball",
        hands=((-1.1, 0.35), (1.0, 0.5)),
        feet=((-0.15, 1.0), (0.85, 0.62)),
        knees=(1, -1),
        lean=-8,
        look=0.8,
        prop="ball",
    ),
    Activity("holding an umbrella", hands=((-0.66, 0.95), (0.62, 0.3)), prop="umbrella", loose=0),
    Activity("playing the guitar", hands=((-0.15, 0.78), (0.85, 0.35)), prop="guitar", loose=0),
    Activity(
        "sweeping",
        hands=((0.2, 0.5), (0.55, 0.85)),
        feet=((-0.4, 1.0), (0.3, 1.0)),
        prop="broom",
        lean=6,
        look=0.7,
        loose=0,
    ),
    Activity(
        "lifting weights",
        hands=((-0.95, -0.74), (0.95, -0.74)),
        elbows=(-1, 1),
        feet=((-0.42, 0.97), (0.42, 0.97)),
        prop="barbell",
        loose=0,
    ),
)
