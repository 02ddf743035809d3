"""Checks of one record: its names, texts and boxes. Images are known by their sizes only."""

import re
import unicodedata
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import NamedTuple

from idavlm.data.errors import quote
from idavlm.data.introductions import reads_as_name
from idavlm.data.record_meta import META_FIELDS, meta_of, origins_of, people_of
from idavlm.data.schema import Box, Sample
from idavlm.data.validation.problems import WARNING
from idavlm.utils import contains_name
from idavlm.utils.answer_parsing import parse_image_number, says_absent

MARKUP = re.compile(r"<image>|<image_placeholder>|<bbox>|<ref-object>|</?img>|<video>|<audio>")
"""Placeholders of other formats. In the text of a sample, they are left over from a wrong reader."""

SMALL_SIDE = 4
"""Sides of boxes below this number of pixels are reported."""

OUTSIDE_PIXELS, OUTSIDE_SHARE = 1.0, 0.005
"""How far a box may leave its image: annotations count pixels from 0 or from 1, and round."""

WHOLE = 0.99
"""Share of the image from which on a box covers it as a whole."""

EQUAL = 0.98
"""Overlap (intersection over union) from which on two boxes count as equal."""

ANSWER_LENGTH = 20
"""Answers below this number of characters may be part of their question, as in 'A or B?'."""


class Finding(NamedTuple):
    """A problem of one record: the check, what is wrong, and the level if it is not that of the check."""

    check: str
    message: str
    level: str | None = None


def check_texts(sample: Sample) -> Iterator[Finding]:
    """Yield the problems of names, texts, answers and ``meta``."""
    yield from _check_names(sample)
    yield from _check_meta(sample)
    yield from _check_turns(sample)
    if sample.is_evaluation:
        yield from _check_answer(sample)
    seen: set[str] = set()
    for image in sample.message_images:
        if image in seen:
            yield Finding("image_repeated", f"the messages hold {quote(image)} more than once.")
        seen.add(image)
    for identity in sample.identities:
        repeated = {image for image in identity.images if identity.images.count(image) > 1}
        for image in sorted(repeated):
            yield Finding("reference_repeated", f"{quote(identity.name)} has the photo {quote(image)} twice.")
    for first, second in combinations(sample.identities, 2):
        for image in sorted(set(first.images) & set(second.images)):
            yield Finding(
                "reference_shared",
                f"{quote(image)} is a photo of {quote(first.name)} and of {quote(second.name)}.",
            )
    for image in sorted(set(sample.reference_images) & set(sample.message_images)):
        yield Finding("reference_is_scene", f"{quote(image)} is a reference and an image that is asked about.")
    yield from _check_origins(sample)


def _check_names(sample: Sample) -> Iterator[Finding]:
    texts = [part.text for message in sample.messages for part in message.content]
    texts += [part.name for message in sample.messages for part in message.content if part.type == "box"]
    texts += [text for text in (sample.answer, sample.target, *sample.false_answers) if text]
    text = "\n".join(texts)
    names = [identity.name for identity in sample.identities]
    mentioned = [name for name in names if contains_name(text, name, ignore_case=False)]
    distractors = meta_of(sample, "distractors")
    for name in names:
        if not reads_as_name(name):
            yield Finding("name_generic", f"{quote(name)} reads as a description; use a name.")
        if name in mentioned:
            continue
        if contains_name(text, name):
            yield Finding("name_spelling", f"texts mention {quote(name)} in another case only; write it alike.")
        elif name not in distractors and not (mentioned and sample.is_evaluation):  # which has one question
            others = f"; the record mentions {', '.join(map(quote, mentioned))}" if mentioned else ""
            yield Finding(
                "name_unmentioned",
                f"{quote(name)} is introduced, but no text mentions it{others}. Correct the name, or list it in "
                "meta.distractors if it is introduced on purpose.",
                WARNING if mentioned else None,
            )
    alike: dict[str, str] = {}
    for name in names:
        folded = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        if folded in alike:
            yield Finding("names_alike", f"{quote(alike[folded])} and {quote(name)} are nearly the same name.")
        alike[folded] = name


def _check_meta(sample: Sample) -> Iterator[Finding]:
    if not isinstance(sample.meta, dict):
        return
    for field, kind in META_FIELDS.items():
        value = sample.meta.get(field)
        if value is not None and not isinstance(value, kind):
            yield Finding("meta", f"meta.{field} is {type(value).__name__} {quote(value)}, expected a {kind.__name__}.")
    names = {identity.name for identity in sample.identities} | {box.name for box in sample.all_boxes}
    for field in ("people", "distractors"):
        for name in meta_of(sample, field):
            if name not in names:
                yield Finding("meta", f"meta.{field} holds {quote(name)}, which is not a name of the record.")
    for field, images in (("references", sample.reference_images), ("scenes", sample.message_images)):
        for entry in meta_of(sample, field):
            if not isinstance(entry, dict) or entry.get("image") not in images:
                yield Finding("meta", f"meta.{field} holds {quote(entry)}, whose image is not one of the {field}.")
    introduced: dict[str, str] = {}
    for identity in sample.identities:
        person = people_of(sample).get(identity.name)
        if person is None:
            continue
        if str(person) in introduced:
            yield Finding(
                "person_twice",
                f"{quote(introduced[str(person)])} and {quote(identity.name)} are both the person {quote(person)}.",
            )
        introduced[str(person)] = identity.name


def _check_origins(sample: Sample) -> Iterator[Finding]:
    """References of the shot or of the scene that is asked about. Whole copies and crops are found by their pixels."""
    references, scenes = (origins_of(sample, field) for field in ("references", "scenes"))
    for reference, first in references.items():
        for scene, second in scenes.items():
            if reference == scene:
                continue
            for field, check in (("shot", "same_shot"), ("scene", "same_scene")):
                if first.get(field) and first[field] == second.get(field):
                    key = quote(first[field])
                    yield Finding(check, f"reference {quote(reference)} and {quote(scene)} are of the {field} {key}.")
                    break


def _check_turns(sample: Sample) -> Iterator[Finding]:
    for number, message in enumerate(sample.messages):
        text = "".join(part.text for part in message.content)
        found = MARKUP.search(text)
        if found:
            yield Finding("markup_in_text", f"messages[{number}] holds {found[0]!r}; choose the reader of the format.")
        has_box = any(part.type == "box" for part in message.content)
        if message.role == "user" and not text.strip() and not has_box:
            yield Finding("question_missing", f"messages[{number}] of 'user' has images, but no text.")
    for place in range(1, len(sample.messages)):
        question, answer = (
            " ".join("".join(part.text for part in message.content).split())
            for message in sample.messages[place - 1 : place + 1]
        )
        if sample.messages[place].role != "assistant":
            continue
        if len(answer) >= ANSWER_LENGTH and answer.casefold() in question.casefold():
            yield Finding("answer_in_question", f"messages[{place - 1}] holds the answer {quote(answer)}.")
        asked = [identity.name for identity in sample.identities if contains_name(question, identity.name)]
        boxed = {box.name for box in sample.boxes}
        if len(asked) == 1 and asked[0] in boxed and _asks_where(question) and says_absent(answer):
            yield Finding(
                "absent_but_boxed",
                f"the answer {quote(answer)} says that {quote(asked[0])} is absent, but boxes has its box.",
            )


def _asks_where(question: str) -> bool:
    return any(word in question.casefold() for word in ("where", "find", "locate", "grounding"))


def _check_answer(sample: Sample) -> Iterator[Finding]:
    if sample.task in ("qa_single", "qa_multi") and not sample.false_answers:
        yield Finding("choices", f"a {sample.task} record needs false_answers.")
    repeated = {text for text in sample.false_answers if sample.false_answers.count(text) > 1}
    for text in sorted(repeated):
        yield Finding("choices", f"false_answers holds {quote(text)} more than once.")
    if sample.task == "matching":
        count = len(sample.message_images)
        for text in (sample.answer, *sample.false_answers):
            number = parse_image_number(text)
            if number is not None and not 1 <= number <= count:
                yield Finding("choices", f"{quote(text)} is the answer of a record with {count} images.")
    if sample.task == "location" and sample.target is not None:
        question = "".join(part.text for part in sample.messages[-1].content)
        if sample.target not in [identity.name for identity in sample.identities]:
            yield Finding("target", f"target={quote(sample.target)} is not introduced by references.")
        elif not contains_name(question, sample.target):
            yield Finding("target", f"the question does not ask for target={quote(sample.target)}.")


def check_boxes(sample: Sample, sizes: Mapping[str, tuple[int, int]]) -> Iterator[Finding]:
    """Yield the problems of the boxes.

    Args:
        sample: the sample.
        sizes: (height, width) of its images, as far as they could be opened.
    """
    boxes: dict[str, list[tuple[Box, tuple[float, float, float, float]]]] = {}
    for box in sample.all_boxes:
        size = sizes.get(box.image)
        if size is None:
            continue
        height, width = size
        x1, y1, x2, y2 = box.box
        name = f"box {box.box} of {quote(box.name)} in {quote(box.image)} ({width} x {height})"
        if box.relative:
            x1, y1, x2, y2 = x1 * width, y1 * height, x2 * width, y2 * height
        elif max(box.box) <= 1 and min(size) > SMALL_SIDE:
            yield Finding("box_units", f'{name} is within 0..1; add "relative": true, or write pixels.')
            continue
        across, down = (OUTSIDE_PIXELS + OUTSIDE_SHARE * side for side in (width, height))
        if x1 < -across or y1 < -down or x2 > width + across or y2 > height + down:
            yield Finding("box_outside", f"{name} leaves the image{_hint(box, size)}.")
            continue
        boxes.setdefault(box.image, []).append((box, (x1, y1, x2, y2)))
        if x2 - x1 < SMALL_SIDE or y2 - y1 < SMALL_SIDE:
            yield Finding("box_small", f"{name} has a side of less than {SMALL_SIDE} pixels.")
    for image, found in boxes.items():
        height, width = sizes[image]
        names = {box.name for box, _ in found}
        for box, (x1, y1, x2, y2) in found:
            if len(names) > 1 and (x2 - x1) * (y2 - y1) >= WHOLE * width * height:
                yield Finding("box_whole_image", f"the box of {quote(box.name)} covers all of {quote(image)}.")
        for (first, a), (second, b) in combinations(found, 2):
            if first.name != second.name and first.name and second.name and _overlap(a, b) >= EQUAL:
                yield Finding(
                    "boxes_equal", f"{quote(first.name)} and {quote(second.name)} have the same box in {quote(image)}."
                )


def _hint(box: Box, size: tuple[int, int]) -> str:
    """A probable cause of a box that leaves its image."""
    height, width = size
    _, _, x2, y2 = box.box
    if box.relative:
        return ""
    if y2 <= width and x2 <= height:
        return "; x and y may be exchanged"
    if max(box.box) <= 1000 and max(size) < 1000:
        return "; it may be in 0..1000 of width and height"
    return ""


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)
