"""Miniature annotation sets in the formats of VCR, Flickr30k Entities, Shikra, RefCOCO, MovieNet and own folders.

The formats are those of the published files; texts and images are invented.
"""

import io
import json
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def write_image(path: Path, size: tuple[int, int] = (160, 120), seed: int = 0) -> Path:
    """Write a JPEG of smooth noise, which is different for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(size, seed))
    return path


def image_bytes(size: tuple[int, int] = (160, 120), seed: int = 0) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 255, (15, 20, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=95)
    return stream.getvalue()


def write_lines(path: Path, records: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


# VCR

VCR_BOXES = [[10, 10, 70, 110, 0.99], [80, 10, 140, 110, 0.98], [5, 5, 50, 60, 0.97], [100, 5, 150, 60, 0.96]]


def vcr_frame(root: Path, film: str, number: int, *, size=(160, 120), boxes=None, seed: int | None = None) -> str:
    """Write a frame of VCR with its metadata; return its path below ``vcr1images``."""
    name = f"{film}/{number}@0.jpg"
    write_image(root / "vcr1images" / name, size, seed=number if seed is None else seed)
    metadata = {"boxes": VCR_BOXES if boxes is None else boxes, "segms": [], "names": [], "width": 160, "height": 120}
    (root / "vcr1images" / name).with_suffix(".json").write_text(json.dumps(metadata))
    return name


def vcr_line(image: str, number: int = 0, **fields) -> dict:
    """A line of VCR: people 0 and 1, a cup 2, another person 3."""
    film = image.split("/")[0]
    line = {
        "movie": film,
        "objects": ["person", "person", "cup", "person"],
        "interesting_scores": [0],
        "answer_likelihood": "likely",
        "img_fn": image,
        "metadata_fn": image.replace(".jpg", ".json"),
        "question": ["Why", "does", [0], "look", "at", [1], "for", "2", "hours", "?"],
        "question_orig": "Why does 1 look at 2 for 2 hours?",
        "answer_choices": [
            [[1], "spoke", "."],
            [[0], "is", "bored", "."],
            [[0], "wants", [2], "."],
            ["They", "are", "asleep", "."],
        ],
        "answer_orig": "2 spoke.",
        "answer_label": 0,
        "rationale_choices": [[[1], "'", "s", "mouth", "is", "open", "."], ["No", "."], ["Yes", "."], ["Maybe", "."]],
        "rationale_orig": "2's mouth is open.",
        "rationale_label": 0,
        "img_id": f"train-{number}",
        "question_number": 0,
        "annot_id": f"train-{number}",
        "match_fold": "train-0",
        "match_index": 0,
    }
    return line | fields


def write_vcr(root: Path, num_lines: int = 12, *, films: int = 4) -> Path:
    """Write ``train.jsonl`` with frames of several films; return the folder."""
    images = [vcr_frame(root, f"lsmdc_{film}_Film_{film}", film, seed=film) for film in range(films)]
    write_lines(root / "train.jsonl", [vcr_line(images[n % films], n) for n in range(num_lines)])
    return root


# Flickr30k Entities and Shikra

FLICKR_SENTENCES = [
    "[/EN#1/people A man] in [/EN#3/clothing a red hat] looks at [/EN#2/people a man] while "
    "[/EN#0/notvisual it] rains on the street .",
    "[/EN#4/people Two men] walk beside [/EN#5/vehicles a parked car] on a very quiet street .",
    "[/EN#6/people A crowd of people] stands near [/EN#1/people a man] on the old stone bridge today .",
    "[/EN#1/people A man] smiles .",
    "[/EN#7/people A tiny person] looks from the window of a house far away there .",
]

FLICKR_OBJECTS = [
    ([1, 4], (11, 11, 70, 110)),
    ([2, 4], (81, 11, 140, 110)),
    ([3], (20, 1, 50, 15)),
    ([6], (1, 1, 160, 120)),
    ([7], (150, 5, 158, 15)),
]


def write_flickr(root: Path, names=("100", "101"), *, sentences=FLICKR_SENTENCES, objects=FLICKR_OBJECTS) -> Path:
    """Write Flickr30k Entities; images are in ``flickr30k-images``."""
    for number, name in enumerate(names):
        write_image(root / "flickr30k-images" / f"{name}.jpg", seed=number)
        path = root / "Sentences" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(sentences) + "\n")
        entries = [_flickr_object(chains, box) for chains, box in objects]
        entries.append("<object><name>5</name><scene>0</scene><nobndbox>1</nobndbox></object>")
        xml = (
            f"<annotation><filename>{name}.jpg</filename><size><width>160</width><height>120</height><depth>3</depth>"
            f"</size>{''.join(entries)}</annotation>"
        )
        path = root / "Annotations" / f"{name}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(xml)
    (root / "train.txt").write_text("\n".join(names) + "\n")
    return root


def _flickr_object(chains, box) -> str:
    names = "".join(f"<name>{chain}</name>" for chain in chains)
    corners = "".join(
        f"<{tag}>{value}</{tag}>" for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    )
    return f"<object>{names}<bndbox>{corners}</bndbox></object>"


def shikra_line(image: str, number: int = 0, **fields) -> dict:
    return {
        "id": number,
        "image_id": image,
        "boxes": [[10, 10, 70, 110], [80, 10, 140, 110]],
        "sentence": "<ph_st>a man<ph_ed> in a hat looks at <ph_st>a man<ph_ed> while it rains outside .",
        "boxes_seq": [[0], [1]],
    } | fields


# RefCOCO


def python2_pickle(value) -> bytes:
    """A pickle as Python 2 writes it: its strings are byte strings."""
    return b"\x80\x02" + _python2(value) + b"."


def _python2(value) -> bytes:
    if isinstance(value, dict):
        return b"}(" + b"".join(_python2(key) + _python2(entry) for key, entry in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_python2, value)) + b"e"
    if isinstance(value, str):
        return b"T" + struct.pack("<i", len(value.encode())) + value.encode()
    return b"J" + struct.pack("<i", value)


def coco_name(image_id: int) -> str:
    return f"COCO_train2014_{image_id:012d}.jpg"


def write_refcoco(root: Path, refs: list[dict], *, by: str = "unc", images=(1, 2, 3)) -> Path:
    """Write ``refs(unc).p`` and ``instances.json``, as in lichengunc/refer; return the folder of the file.

    A ref is ``{"image_id", "ann_id", "split"}``. Each image has the persons ``10 * image_id`` and ``10 * image_id + 1``
    and the dog ``10 * image_id + 2``.
    """
    root.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, ref in enumerate(refs):
        sentence = {"raw": "Woman left", "sent": "woman left", "sent_id": number, "tokens": ["woman", "left"]}
        file_name = f"{coco_name(ref['image_id']).removesuffix('.jpg')}_{ref['ann_id']}.jpg"
        entries.append(
            {"ref_id": number, "category_id": 18 if ref["ann_id"] % 10 == 2 else 1, "file_name": file_name}
            | {"sent_ids": [number], "sentences": [sentence]}
            | ref
        )
    (root / f"refs({by}).p").write_bytes(python2_pickle(entries))
    boxes = ([10, 10, 60, 100], [80, 10, 60, 100], [30, 60, 70, 50])
    annotations = [
        {"id": 10 * image + number, "image_id": image, "category_id": 18 if number == 2 else 1, "bbox": box}
        for image in images
        for number, box in enumerate(boxes)
    ]
    instances = {
        "images": [{"id": image, "file_name": coco_name(image), "width": 160, "height": 120} for image in images],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
    }
    (root / "instances.json").write_text(json.dumps(instances))
    return root


def write_coco_images(root: Path, images=(1, 2, 3)) -> Path:
    for image in images:
        write_image(root / "train2014" / coco_name(image), seed=image)
    return root


def write_jxu124(path: Path, rows: list[tuple[int, int, str]]) -> Path:
    """Write a parquet file as jxu124/refcoco: ``(image_id, ann_id, split)``; raw columns hold the text of dicts."""
    import pyarrow
    from pyarrow import parquet

    table = []
    for image_id, ann_id, split in rows:
        bbox = [10.0, 10.0, 60.0, 100.0]
        table.append(
            {
                "sent_ids": [1],
                "file_name": f"{coco_name(image_id).removesuffix('.jpg')}_{ann_id}.jpg",
                "ann_id": ann_id,
                "ref_id": ann_id,
                "image_id": image_id,
                "split": split,
                "sentences": [{"raw": "man", "sent": "man", "sent_id": 1, "tokens": ["man"]}],
                "category_id": 1,
                "raw_anns": json.dumps({"iscrowd": 0, "bbox": bbox, "category_id": 1, "id": ann_id}),
                "raw_image_info": repr({"file_name": coco_name(image_id), "height": 120, "width": 160}),
                "raw_sentences": "[]",
                "image_path": f"coco/train2014/{coco_name(image_id)}",
                "bbox": [10.0, 10.0, 70.0, 110.0],
                "captions": ["man"],
            }
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(table), path)
    return path


def write_lmms(path: Path, image_ids=(1, 2)) -> Path:
    """Write a parquet file as lmms-lab/RefCOCO, which holds the images."""
    import pyarrow
    from pyarrow import parquet

    table = [
        {
            "question_id": str(number),
            "image": {"bytes": image_bytes(seed=image), "path": None},
            "question": "Please carefully observe the area circled in the image and come up with a caption for it.",
            "answer": ["man on the left", "left"],
            "segmentation": [1.0, 2.0],
            "bbox": [10.0, 10.0, 60.0, 100.0],
            "iscrowd": 0,
            "file_name": f"{coco_name(image).removesuffix('.jpg')}_{number}.jpg",
        }
        for number, image in enumerate(image_ids)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(table), path)
    return path


# MovieNet

RESOLUTION = [1600, 1200]


def movienet_body(shot: int, pid: str, box, *, image: int = 1, **fields) -> dict:
    """An entry of ``cast``; the box is in ``resolution``."""
    return {
        "id": f"{shot}_{image}_{pid}",
        "shot_idx": shot,
        "img_idx": image,
        "frame_idx": shot * 10,
        "resolution": RESOLUTION,
        "body": {"type": "body", "bbox": box},
        "pid": pid,
        "possible_pids": [],
    } | fields


SOLO, LEFT, RIGHT, MIDDLE = [100, 100, 1400, 1100], [50, 100, 700, 1100], [800, 100, 1500, 1100], [700, 300, 800, 600]


def write_film(root: Path, film: str, cast: list[dict], *, people=None, scenes=None, title: str | None = None) -> None:
    """Write the annotation, metadata and frames (160 x 120 pixels) of a film."""
    people = {"nm1": "Ripley", "nm2": "Ash", "nm3": "Dallas"} if people is None else people
    for kind, content in (
        ("annotation", {"cast": cast, "scene": scenes, "story": None, "cinematic_style": None}),
        (
            "meta",
            {
                "title": title or f"Film {film} (1979)",
                "cast": [{"id": pid, "name": "An Actor", "character": name} for pid, name in people.items()],
                "genres": ["Drama"],
            },
        ),
    ):
        path = root / "files" / kind / f"{film}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    for entry in cast:
        if isinstance(entry, dict):
            name = f"shot_{entry['shot_idx']:04d}_img_{entry['img_idx']}.jpg"
            write_image(root / "240P" / film / name, seed=entry["shot_idx"])


def film_cast() -> list[dict]:
    """Three people alone in scenes 1, 2 and 4 and together in scene 3."""
    cast = []
    for start in (0, 10, 30):
        for number, pid in enumerate(("nm1", "nm2", "nm3")):
            cast.append(movienet_body(start + number, pid, SOLO))
    for shot in (20, 22, 24, 26):
        cast += [movienet_body(shot, "nm1", LEFT), movienet_body(shot, "nm2", RIGHT)]
    cast += [movienet_body(28, "others", LEFT), movienet_body(28, "nm3", RIGHT)]
    return cast


FILM_SCENES = [{"id": "s1", "shot": [0, 10]}, {"shot": [10, 20]}, {"shot": [20, 30]}, {"shot": [30, 40]}]


# Own photos and scenes


def write_album(root: Path, people=("Kate", "Tom", "Ida", "Omar", "Zoe"), *, photos: int = 4, scenes: int = 8) -> Path:
    """Write ``people/NAME/*.jpg``, ``scenes/*.jpg`` and ``scenes.jsonl``."""
    for number, person in enumerate(people):
        for photo in range(photos):
            write_image(root / "people" / person / f"{photo}.jpg", (60, 80), seed=100 * number + photo)
    lines = []
    for number in range(scenes):
        name = f"scenes/{number}.jpg"
        write_image(root / name, seed=1000 + number)
        chosen = [people[(number + step) % len(people)] for step in range(2 + number % 2)]
        lines.append(
            {
                "image": name,
                "people": [
                    {"name": person, "box": [5 + 50 * place, 10, 45 + 50 * place, 110], "activity": activity}
                    for place, (person, activity) in enumerate(
                        zip(chosen, ("waving", "reading", "sitting"), strict=False)
                    )
                ],
            }
        )
    write_lines(root / "scenes.jsonl", lines)
    return root
