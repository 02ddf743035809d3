"""Positions of the joints of a character in an activity."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from idavlm.datasets.characters.activities import Activity
from idavlm.datasets.characters.look import CharacterLook
from idavlm.datasets.characters.shapes import turned

ARM = 27.0
LEG = 31.0
TORSO = 29.0


@dataclass(frozen=True)
class Joints:
    """Points ``[2]`` of a posed figure. The ground is y = 0, y points down. Pairs are (left, right) as seen."""

    chest: np.ndarray
    hips: np.ndarray
    head: np.ndarray
    shoulders: tuple[np.ndarray, np.ndarray]
    elbows: tuple[np.ndarray, np.ndarray]
    hands: tuple[np.ndarray, np.ndarray]
    hip_joints: tuple[np.ndarray, np.ndarray]
    knees: tuple[np.ndarray, np.ndarray]
    feet: tuple[np.ndarray, np.ndarray]


def pose(look: CharacterLook, activity: Activity, rng: np.random.Generator) -> Joints:
    """Compute the joints of a character in an activity. ``rng`` jitters the limbs."""
    leg, torso, arm = LEG * look.height, TORSO * look.height**0.5, ARM * look.height**0.6
    lean = activity.lean + rng.uniform(-2.5, 2.5)
    hips = np.zeros(2)
    chest = turned((0, -torso), lean)
    half_shoulders, half_hips = 9.5 * look.build, 5.2 * look.build
    shoulders = tuple(chest + turned((side * half_shoulders, 2.5), lean) for side in (-1, 1))
    hip_joints = tuple(np.array([side * half_hips, 0.0]) for side in (-1, 1))
    loose = activity.loose * arm
    hands = [chest + np.multiply(hand, arm) + rng.uniform(-loose, loose, 2) for hand in activity.hands]
    feet = [hips + np.multiply(foot, leg) + rng.uniform(-1, 1, 2) * (1.2, 0) for foot in activity.feet]
    elbows, hands = _limbs(shoulders, hands, arm / 2, activity.elbows)
    knees, feet = _limbs(hip_joints, feet, leg / 2, activity.knees)
    head = chest + turned((0, -16.5 * look.head_height), lean)
    # Until here the hips are the origin. Move the lower foot to its height above the ground.
    down = np.array([0, -max(foot[1] for foot in feet) - 3 - activity.lift * LEG])
    pairs = (shoulders, elbows, hands, hip_joints, knees, feet)
    return Joints(chest + down, hips + down, head + down, *((left + down, right + down) for left, right in pairs))


def reach(origin: np.ndarray, target: np.ndarray, bone: float, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of elbow and hand of a limb of two bones of length ``bone`` from ``origin`` towards ``target``."""
    way = target - origin
    distance = min(max(float(np.hypot(*way)), 1e-6), 2 * bone * 0.995)
    along = way / max(float(np.hypot(*way)), 1e-6)
    height = (bone**2 - distance**2 / 4) ** 0.5
    elbow = origin + along * distance / 2 + np.array([-along[1], along[0]]) * side * height
    return elbow, origin + along * distance


def _limbs(
    origins: Sequence[np.ndarray], targets: Sequence[np.ndarray], bone: float, sides: Sequence[int]
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    reached = [reach(*limb) for limb in zip(origins, targets, (bone, bone), sides, strict=True)]
    return [elbow for elbow, _ in reached], [hand for _, hand in reached]
