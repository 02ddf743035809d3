"""A miniature benchmark in the format of MM-ID with drawn images; names and texts are invented."""

import json
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

FILMS = ("movie/The Long Table (1971)", "movie/Rain, Again (2003)", "animation/Paper Boats")
NAMES = ("Ada Lund", "Bo Reyes", "Cora", "Captain Dain")
DOES = ("pouring tea", "reading a map", "waving", "asleep on a bench")


def build_mmid(folder: Path, rounds: int = 2) -> Path:
    """Write ``folder/benchmark.json`` and its images; ``rounds`` times every task and film."""
    items: list[dict] = []
    rng = Random(0)
    for _ in range(rounds):
        for number, film in enumerate(FILMS):
            _add_film(folder, items, film, number, rng)
        for place in range(4):
            _add_matching(folder, items, place, rng)
    for number, item in enumerate(items, 1):
        item["id"] = number
    path = folder / "benchmark.json"
    path.write_text(json.dumps(items, indent=1))
    return path


def _add_film(folder: Path, items: list[dict], film: str, number: int, rng: Random) -> None:
    left, right = NAMES[number], NAMES[number + 1]
    shot = len(items)
    references = {name: f"./images/{film}/{name}_shot_{shot:04d}_img_0_special.jpg" for name in (left, right)}
    scenes = [f"./images/{film}/shot_{shot:04d}_img_{index}.jpg" for index in range(3)]
    boxes = {left: [30, 20, 130, 200], right: [180, 35, 300, 230]}
    for name, path in references.items():
        _draw(folder / path, {name: [10, 10, 110, 110]}, (120, 120))
    for path in scenes:
        _draw(folder / path, boxes, (320, 240))
    intro = f"{left} is <img>image_1</img>\n {right} is <img>image_2</img>\n"
    base = {"image_1": references[left], "image_2": references[right], "image_3": scenes[0]}
    target = rng.choice([left, right])
    items.append(
        base
        | {
            "question": f"{intro} In the image: <img>image_3</img>\n Identify {target} with grounding.",
            "type": "location",
            "answer": str(boxes[target]),
            "ground_target": target,
        }
    )
    does = dict(zip((left, right), rng.sample(DOES, 2), strict=True))
    slash = (" / ", "/ ", "/")[number]
    items.append(
        base
        | {
            "question": f"{intro} In the image: <img>image_3</img>\n What is {left} doing?",
            "type": "QA_singleimage",
            "answer": f"{left} is {does[left]}.",
            "false answers": slash.join([f"{left} is {does[right]}.", f"{right} is {does[left]}."]),
        }
    )
    short_names = [name.split()[-1] if number else name for name in (left, right)]
    items.append(
        base
        | {
            "question": f"{intro} Please describe the image: <img>image_3</img>\n",
            "answer": f"{short_names[0]} is {does[left]} while {short_names[1]} is {does[right]}.",
            "type": "caption_singleimage",
        }
    )
    several = {"image_4": scenes[1], "image_5": scenes[2]}
    shown = "<img>image_3</img>\n<img>image_4</img>\n<img>image_5</img>\n"
    items.append(
        base
        | several
        | {
            "question": f"{intro} In these pictures {shown}. What does {right} do?",
            "answer": f"{right} stands up and walks to {left}.",
            "type": "QA_multiimage",
            "false answers": f"{right} sits down." if number else "",
        }
    )
    items.append(
        base
        | several
        | {
            "question": f"{intro} What is displayed in these images {shown}?",
            "answer": f"{left} comes in, then {right} leaves.",
            "type": "caption_multiimage",
        }
    )


def _add_matching(folder: Path, items: list[dict], place: int, rng: Random) -> None:
    shot = len(items)
    paths = [f"./images/match/person/film{shot}/shot{index}.jpg" for index in range(5)]
    name = NAMES[rng.randrange(4)]
    for index, path in enumerate(paths):
        _draw(folder / path, {name if index in (0, place + 1) else "another": [20, 10, 90, 90]}, (100, 100))
    shown = " ".join(f"Image {index}: <img>image_{index}</img>\n" for index in range(1, 5))
    items.append(
        {f"image_{index}": path for index, path in enumerate(paths)}
        | {
            "question": f"{name} is <img>image_0</img>\n In the following four images, Which is {name}? {shown}",
            "answer": f"Image {place + 1}",
            "type": "matching",
            "reference_target": f"{name} ",
        }
    )


def _draw(path: Path, boxes: dict[str, list[int]], size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size, "#e8e4da")
    draw = ImageDraw.Draw(image)
    for name, box in boxes.items():
        colour = "#%06x" % (sum(ord(letter) * 7919**place for place, letter in enumerate(name)) % 0xC0C0C0)
        draw.ellipse(box, fill=colour)
    image.save(path)
