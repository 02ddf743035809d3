"""One answer as an image: references, the images of the question, and the boxes."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageOps

from idavlm.data.images import ImageStore
from idavlm.data.schema import Sample
from idavlm.evaluation.results import Prediction

TRUE, PREDICTED, INK, PAPER = "#1a9850", "#f58b1f", "#222222", "#ffffff"
_REFERENCE, _SCENE, _GAP, _LINE = 96, 320, 6, 14  # longest sides, gap and height of a line in pixels


def draw_answer(sample: Sample, prediction: Prediction) -> Image.Image:
    """Draw references above the images of a question. The right box is green, the predicted one orange.

    Args:
        sample: the question; its images are opened below ``image_root``, or are PIL images.
        prediction: its scored answer. Boxes belong to the last image.
    """
    references = [
        _titled(_fitted(_open(sample, image), _REFERENCE), identity.name)
        for identity in sample.identities
        for image in identity.images
    ]
    scenes = []
    for number, path in enumerate(sample.message_images, 1):
        original = _open(sample, path)
        scene = _fitted(original, _SCENE)
        if number == len(sample.message_images):
            scale = scene.width / original.width
            for box, colour in ((prediction.gold_box, TRUE), (prediction.box, PREDICTED)):
                if box is not None:
                    edges = [edge * scale for edge in box]
                    corners = [min(edges[0::2]), min(edges[1::2]), max(edges[0::2]), max(edges[1::2])]
                    ImageDraw.Draw(scene).rectangle(corners, outline=colour, width=2)
        scenes.append(_titled(scene, f"image {number}" if len(sample.message_images) > 1 else ""))
    return _stacked([_side_by_side(row) for row in (references, scenes) if row])


def _open(sample: Sample, image) -> Image.Image:
    return image if isinstance(image, Image.Image) else ImageStore(sample.image_root).open(image)


def _fitted(image: Image.Image, side: int) -> Image.Image:
    return ImageOps.contain(image.convert("RGB"), (side, side))


def _titled(image: Image.Image, title: str) -> Image.Image:
    """The image below its title."""
    if not title:
        return image
    canvas = Image.new("RGB", (image.width, image.height + _LINE), PAPER)
    canvas.paste(image, (0, _LINE))
    ImageDraw.Draw(canvas).text((0, 1), title, fill=INK)
    return canvas


def _side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    width = sum(image.width for image in images) + _GAP * (len(images) - 1)
    canvas = Image.new("RGB", (width, max(image.height for image in images)), PAPER)
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width + _GAP
    return canvas


def _stacked(rows: Sequence[Image.Image]) -> Image.Image:
    if not rows:
        return Image.new("RGB", (1, 1), PAPER)
    canvas = Image.new(
        "RGB", (max(row.width for row in rows), sum(row.height for row in rows) + _GAP * (len(rows) - 1)), PAPER
    )
    top = 0
    for row in rows:
        canvas.paste(row, (0, top))
        top += row.height + _GAP
    return canvas
