"""``idavlm film``: who appears when and where in a film."""

import argparse

from idavlm.cli.arguments import path
from idavlm.cli.model_arguments import add_model_arguments, check_model_arguments, load_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("source", type=path, metavar="VIDEO_OR_FOLDER", help="a video file, or a folder of images")
    parser.add_argument(
        "--cast", required=True, type=path, help="folder with one sub-folder of photos per person: DIR/Kate/1.jpg, ..."
    )
    parser.add_argument("--out", required=True, type=path, help="folder of the results; an interrupted run continues")
    add_model_arguments(parser)
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


def run(arguments: argparse.Namespace) -> None:
    """Write ``film.json``, ``film.vtt`` and ``film.html``, and print who appears for how long."""
    for option in ("source", "cast"):
        if not getattr(arguments, option).exists():
            raise ValueError(f"{option} {getattr(arguments, option)} does not exist.")
    check_model_arguments(arguments)
    if arguments.source.is_file():
        try:
            import av  # noqa: F401
        except ModuleNotFoundError as error:
            raise ValueError("videos need PyAV; install it by pip install 'idavlm[film]'.") from error
    # After the checks, because these imports take seconds.
    from idavlm.inference.film import analyse_film, read_cast

    cast = read_cast(arguments.cast)
    model, processor = load_model(arguments)
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
