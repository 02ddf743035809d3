"""``idavlm ask``: ask a model about images, with reference photos of named identities."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("images", nargs="*", type=Path, help="images that the question is about")
    parser.add_argument("question", help='for example "Where is Kate?"')
    parser.add_argument(
        "--model", required=True, help="checkpoint of idavlm, or a vision-language model of transformers"
    )
    parser.add_argument("--id-former", type=Path, help="folder of save_id_former; attaches it to --model")
    parser.add_argument(
        "--identity",
        action="append",
        default=[],
        metavar="NAME=PHOTO[,PHOTO...]",
        help="an identity and its reference photos; repeat it for several identities",
    )
    parser.add_argument("--draw", type=Path, metavar="FILE", help="write the last image with the box of the answer")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="maximum length of the answer")
    parser.add_argument("--device", help="device of the model; by default cuda if available, else cpu")


def run(arguments: argparse.Namespace) -> None:
    """Print the answer and, with ``--draw``, write the image with its box."""
    identities = dict(_identity(text) for text in arguments.identity)
    for path in (*arguments.images, *(photo for photos in identities.values() for photo in photos)):
        if not path.is_file():
            raise ValueError(f"{path} does not exist or is not a file; pass the path of an image.")
    if arguments.draw is not None and not arguments.images:
        raise ValueError(f"--draw {arguments.draw} needs an image to draw on; pass one before the question.")
    # After the checks, because these imports take seconds.
    from idavlm.evaluation import load_checkpoint
    from idavlm.models.asking import ask

    model, processor = load_checkpoint(arguments.model, id_former=arguments.id_former, device=arguments.device)
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
    name, equals, photos = text.partition("=")
    if not name or not equals or not photos:
        raise ValueError(f"--identity {text!r} is not NAME=PHOTO[,PHOTO...]; for example Kate=kate_1.jpg,kate_2.jpg.")
    return name, [Path(photo) for photo in photos.split(",")]


def _draw(path: Path, answer: str, processor, out: Path) -> None:
    from PIL import Image, ImageDraw, ImageOps

    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file).convert("RGB")
    box = processor.parse_box(answer, (image.height, image.width))
    if box is None:
        raise ValueError(f"the answer {answer[:200]!r} holds no box, so --draw {out} has nothing to draw.")
    ImageDraw.Draw(image).rectangle(box, outline=(255, 40, 40), width=max(2, min(image.size) // 100))
    image.save(out)
    print(out)
