"""``idavlm film``: who appears when and where in a film."""

import argparse

from idavlm.cli.arguments import name, path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("source", type=path, metavar="VIDEO_OR_FOLDER", help="a video file, or a folder of images")
    parser.add_argument(
        "--cast", required=True, type=path, help="folder with one sub-folder of photos per person: DIR/Kate/1.jpg, ..."
    )
    parser.add_argument("--out", required=True, type=path, help="folder of the results; an interrupted run continues")
    parser.add_argument(
        "--model",
        default="idavlm-tiny",
        type=name,
        help="checkpoint of idavlm, or a vision-language model of transformers; by default idavlm-tiny",
    )
    parser.add_argument("--id-former", type=path, help="folder of save_id_former; attaches it to --model")
    parser.add_argument("--fps", type=float, default=2.0, help="frames that are looked at per second; by default 2")
    parser.add_argument(
        "--threshold", type=float, default=0.9, help="score from which a frame speaks for a person; by default 0.9"
    )
    parser.add_argument(
        "--cut-threshold", type=float, default=0.15, help="change of the image that is a cut; by default 0.15"
    )
    parser.add_argument(
        "--smoothing", type=float, default=3.0, help="evidence that coming or going needs; by default 3; 0 for none"
    )
    parser.add_argument("--device", type=name, help="device of the model; by default cuda if available, else cpu")


def run(arguments: argparse.Namespace) -> None:
    """Write ``film.json``, ``film.vtt`` and ``film.html``, and print who appears for how long."""
    for option in ("source", "cast"):
        if not getattr(arguments, option).exists():
            raise ValueError(f"{option} {getattr(arguments, option)} does not exist.")
    # After the checks, because these imports take seconds.
    import torch

    from idavlm.evaluation import load_checkpoint
    from idavlm.inference.film import analyse_film, read_cast

    cast = read_cast(arguments.cast)
    device = arguments.device if arguments.device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = load_checkpoint(arguments.model, id_former=arguments.id_former, device=device)
    tracks = analyse_film(
        model.eval(),
        processor,
        arguments.source,
        cast,
        arguments.out,
        frames_per_second=arguments.fps,
        threshold=arguments.threshold,
        cut_threshold=arguments.cut_threshold,
        smoothing=arguments.smoothing,
    )
    for person in cast:
        of_person = [track for track in tracks if track.name == person]
        seconds = sum(track.end - track.start for track in of_person)
        print(f"{person}: {seconds:.1f} s in {len(of_person)} tracks")
    print(arguments.out / "film.html")
