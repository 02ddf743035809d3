"""The complete figure: clothes, limbs, head and objects around the joints."""

import numpy as np

from idavlm.datasets.characters.activities import Activity
from idavlm.datasets.characters.clothes import draw_extra_back, draw_extra_front, draw_skirt, draw_torso
from idavlm.datasets.characters.head import Expression, head_sketches
from idavlm.datasets.characters.look import CharacterLook
from idavlm.datasets.characters.pose import Joints, pose
from idavlm.datasets.characters.props import PROPS
from idavlm.datasets.characters.shapes import Sketch, between, moved, shade


def figure(look: CharacterLook, activity: Activity, rng: np.random.Generator) -> Sketch:
    """Sketch a character in an activity, with the feet on y = 0, about 100 units tall.

    ``rng`` decides what differs between two images of one character: expression, tilt of the head, limbs.
    """
    joints = pose(look, activity, rng)
    back, front = PROPS[activity.prop](joints, rng) if activity.prop else (Sketch(), Sketch())
    tilt = rng.uniform(-7, 7) + activity.lean * 0.5
    back_of_head, head = head_sketches(look, Expression.drawn(rng, activity), tilt)

    sketch = Sketch()
    sketch.add(back)
    draw_extra_back(sketch, look, joints)
    sketch.add(back_of_head, joints.head)
    _draw_legs(sketch, look, joints, activity)
    draw_torso(sketch, look, joints)
    if look.lower in ("skirt", "robe"):
        draw_skirt(sketch, look, joints)
    draw_extra_front(sketch, look, joints)
    sketch.add(head, joints.head)
    sketch.add(front)
    _draw_arms(sketch, look, joints)
    return sketch


def _draw_legs(sketch: Sketch, look: CharacterLook, joints: Joints, activity: Activity) -> None:
    width = 8.6 * look.build**0.7
    bare = look.lower in ("skirt", "shorts")
    for number, (hip, knee, foot) in enumerate(zip(joints.hip_joints, joints.knees, joints.feet, strict=True)):
        cloth = shade(look.lower_colour, (0.82, 0.94)[number])
        skin = shade(look.skin, (0.86, 0.95)[number])
        sketch.limb(knee, foot, width * 0.8 if bare else width, skin if bare else cloth, width * 0.74)
        sketch.limb(hip, knee, width * 1.1, skin if look.lower == "skirt" else cloth, width)
        toe = (activity.look or (-1, 1)[number]) * 3.4
        sketch.ellipse(moved(foot, toe * 0.7, 0.8), 5.8, 3.1, shade(look.shoe_colour, (0.82, 1)[number]))


def _draw_arms(sketch: Sketch, look: CharacterLook, joints: Joints) -> None:
    width = 7.4 * look.build**0.5
    cloth = look.second_colour if look.sleeves == "second" else look.shirt_colour
    if look.shirt_pattern == "jacket":
        cloth = look.second_colour
    for number, (shoulder, elbow, hand) in enumerate(zip(joints.shoulders, joints.elbows, joints.hands, strict=True)):
        tone = (0.84, 0.92)[number]
        sketch.circle(hand, 4.1, shade(look.skin, 0.95))
        fore = shade(look.skin, tone) if look.sleeves == "short" else shade(cloth, tone)
        sketch.limb(elbow, between(elbow, hand, 0.82), width * 0.92, fore, width * 0.78)
        sketch.limb(shoulder, elbow, width, shade(cloth, tone), width * 0.92)
