"""``idavlm ask``: ask a model about images, with reference photos of named identities."""

import argparse
from pathlib import Path

from idavlm.cli.arguments import name, path, positive_int
from idavlm.cli.model_arguments import add_model_arguments, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("images", nargs="*", type=path, help="images that the question is about")
    parser.add_argument("question", type=name, help='for example "Where is Kate?"')
    add_model_arguments(parser)
    parser.add_argument(
        "--identity",
        action="append",
        default=[],
        metavar="NAME=PHOTO[,PHOTO...]",
        help="an identity and its reference photos; repeat it for several identities",
    )
    parser.add_argument("--draw", type=path, metavar="FILE", help="write the last image with the box of the answer")
    parser.add_argument("--max-new-tokens", type=positive_int, default=64, help="maximum length of the answer")


def run(arguments: argparse.Namespace) -> None:
    """Print the answer and, with ``--draw``, write the image with its box."""
    identities: dict[str, list[Path]] = {}
    for introduced, photos in map(_identity, arguments.identity):
        identities.setdefault(introduced, []).extend(photos)
    for file in (*arguments.images, *(photo for photos in identities.values() for photo in photos)):
        if not file.is_file():
            raise ValueError(f"{file} does not exist or is not a file; pass the path of an image.")
    if arguments.draw is not None and not arguments.images:
        raise ValueError(f"--draw {arguments.draw} needs an image to draw on; pass one before the question.")
    model, processor = load_model(arguments)
    from idavlm.models import ask  # after the checks, because this import takes seconds

    answer = ask(
        model,
        processor,
        arguments.question,
        images=arguments.images,
        identities=identities,
        max_new_tokens=arguments.max_new_tokens,
    )
    print(answer)
    if arguments.draw is not None:
        _draw(arguments.images[-1], answer, processor, arguments.draw)


def _identity(text: str) -> tuple[str, list[Path]]:
    introduced, _, photos = text.partition("=")
    if not introduced or not photos:
        raise ValueError(f"--identity {text!r} is not NAME=PHOTO[,PHOTO...]; for example Kate=kate_1.jpg,kate_2.jpg.")
    return introduced, [Path(photo) for photo in photos.split(",")]


def _draw(image_file: Path, answer: str, processor, out: Path) -> None:
    from PIL import ImageDraw

    from idavlm.data.photos import PhotoLoader

    image = PhotoLoader(**processor.image_limits).load(image_file, field="the image")
    box = processor.parse_box(answer, (image.height, image.width))
    if box is None:
        raise ValueError(f"the answer {answer[:200]!r} holds no box, so --draw {out} has nothing to draw.")
    ImageDraw.Draw(image).rectangle(box, outline=(255, 40, 40), width=max(2, min(image.size) // 100))
    image.save(out)
    print(out)
