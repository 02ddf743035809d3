"""A fake of the game: unit files and sprites in the folder structure of its data, small enough for tests."""

from pathlib import Path

import numpy as np
from PIL import Image

NUM_UNITS = 24
FRAMES = ("", "-bow-attack1", "-bow-attack2", "-defend-1", "-defend-2", "-melee-1", "-melee-2", "-idle-1", "-idle-2")


def sprite(number: int, frame: int) -> Image.Image:
    """A 72 x 72 figure with proportions and colours of the unit, and an arm at a different height in every frame."""
    rng = np.random.default_rng(number)
    pixels = np.zeros((72, 72, 4), dtype=np.uint8)
    half = 8 + number % 5
    pixels[20:60, 36 - half : 36 + half] = (*rng.integers(0, 200, 3), 255)
    pixels[30:36, 36 - half : 36 + half] = (0xF4, 0x9A, 0xC1, 255)
    pixels[22 + 2 * frame : 26 + 2 * frame, 36 + half : 42 + half + number // 5] = (*rng.integers(50, 250, 3), 255)
    return Image.fromarray(pixels)


def unit_file(number: int) -> str:
    name = f"units/clan/unit{number}"
    return f"""
#textdomain wesnoth-units
#define WEAPON NAME
    [attack_anim]
        [frame]
            image="{name}-{{NAME}}[1~2].png:[100,50]"
        [/frame]
    [/attack_anim]
#enddef
[unit_type]
    id=Unit {number}
    name= _ "male^Unit Number {number}"
    race=clan{number % 3}
    image="{name}.png"
    profile="portraits/clan/unit{number}.png~CROP(0,0,9,9)"
    description= _ "It is said of number {number}:
nothing."
    # image="units/clan/not-this-one.png"
    {{DEFENSE_ANIM "{name}-defend-1.png" "{name}-defend-2.png" {{SOUND}} }}
    {{WEAPON bow-attack}}
    {{WEAPON melee-}}
    [variation]
        image="units/clan/unit0.png"
    [/variation]
[/unit_type]
"""


def make(root: Path, num_units: int = NUM_UNITS) -> Path:
    """Write the data below ``root`` and return the ``data`` folder."""
    data = root / "usr" / "share" / "games" / "wesnoth" / "1.16" / "data"
    images, units = data / "core" / "images", data / "core" / "units" / "clan"
    for folder in (units, images / "units" / "clan", images / "terrain" / "grass", images / "story"):
        folder.mkdir(parents=True)
    (images / "portraits" / "clan").mkdir(parents=True)
    for number in range(num_units):
        (units / f"{number:02d}.cfg").write_text(unit_file(number))
        for frame, ending in enumerate(FRAMES):
            sprite(number, frame).save(images / "units" / "clan" / f"unit{number}{ending}.png")
        portrait = Image.new("RGBA", (60, 60), (number * 9, 0, 0, 255))
        portrait.save(images / "portraits" / "clan" / f"unit{number}.png")
    Image.new("RGBA", (72, 72), (30, 120, 30, 255)).save(images / "terrain" / "grass" / "green.png")
    Image.new("RGB", (640, 480), (90, 140, 200)).save(images / "story" / "landscape-hills-01.jpg")
    return data
