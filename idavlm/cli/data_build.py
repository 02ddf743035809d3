"""``idavlm data build SOURCE``: build tuning data from annotations of VCR, Flickr30k, RefCOCO, MovieNet or your own."""

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from idavlm.cli.arguments import name, path, positive_int
from idavlm.datasets.tuning import (
    VCR,
    DescriptionFile,
    DescriptionRequest,
    Flickr30kEntities,
    MovieNet,
    PhotoFolder,
    PublishedFlickr30k,
    PublishedMovieNet,
    RefCOCO,
    Splits,
    TuningSource,
    build_tuning_data,
    read_held_out,
)
from idavlm.datasets.tuning.build import ENGINES, PROBLEMS
from idavlm.datasets.tuning.folder import NAMINGS
from idavlm.datasets.tuning.image_files import SCENE_MODES
from idavlm.datasets.tuning.movienet import ALL_TASKS

SHOWN_PROBLEMS = 20

SOURCES = {
    "vcr": ("VCR: questions, answers and rationales about people in film frames", "train.jsonl, or the folder of it"),
    "flickr30k": ("Flickr30k Entities: captions with people", "folder of Sentences/ and Annotations/"),
    "refcoco": ("RefCOCO, RefCOCO+ and RefCOCOg: where is this individual?", "refs(...).p, parquet files, or folders"),
    "movienet": (
        "MovieNet: location, captions and questions about the cast of films",
        "folder of annotation/ and meta/",
    ),
    "folder": ("your own photos and scenes: records of the six tasks", ".jsonl file of scenes with boxes"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add one subcommand per source."""
    sources = parser.add_subparsers(dest="build_source", metavar="SOURCE", required=True)
    for source, (description, annotations) in SOURCES.items():
        _add_source(sources.add_parser(source, help=description, description=description), source, annotations)


def _add_source(parser: argparse.ArgumentParser, source: str, annotations: str) -> None:
    several = {"nargs": "+"} if source == "refcoco" else {}
    parser.add_argument("--annotations", type=path, required=True, help=annotations, **several)
    parser.add_argument("--images", type=path, required=True, help="folder of the images")
    parser.add_argument(
        "--out", type=path, required=True, help="folder to build; a build that was interrupted continues"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all choices")
    parser.add_argument(
        "--distractors",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="share of the records that introduce someone who is not in the image; by default 0.25",
    )
    default = 0.0 if source == "folder" else 0.01
    parser.add_argument(
        "--val", type=float, default=default, metavar="SHARE", help=f"share for validation; by default {default:g}"
    )
    parser.add_argument(
        "--test", type=float, default=default, metavar="SHARE", help=f"share for the test; by default {default:g}"
    )
    parser.add_argument(
        "--held-out",
        type=path,
        nargs="+",
        default=[],
        metavar="OUT",
        help="folders of other built data sets: what they hold out is held out here as well",
    )
    if source != "folder":
        parser.add_argument(
            "--as-published", action="store_true", help="the rules of IDA-VLM's scripts with their mistakes, to compare"
        )
        parser.add_argument("--limit", type=positive_int, metavar="N", help="build from the first N annotations only")
    parser.add_argument(
        "--scenes",
        choices=SCENE_MODES,
        default="link",
        help="hard links to the images of the source (the default, takes no space), or copies",
    )
    parser.add_argument("--workers", type=positive_int, default=1, help="number of processes")
    parser.add_argument(
        "--engine", choices=ENGINES, default="local", help="this machine, or Ray on the cluster of RAY_ADDRESS"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    if source == "refcoco":
        parser.add_argument(
            "--categories", type=name, nargs="+", default=["person"], help="COCO categories, or all; by default person"
        )
    if source == "movienet":
        _add_movienet_arguments(parser)
    if source == "folder":
        _add_folder_arguments(parser)


def _add_movienet_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--films", type=path, metavar="FILE", help="file of the ids of the films; by default all")
    parser.add_argument(
        "--tasks", nargs="+", choices=ALL_TASKS, help="tasks; by default location, and all others if there are texts"
    )
    group = parser.add_argument_group(
        "descriptions", "captions and questions: a model at an OpenAI-compatible endpoint (OPENAI_BASE_URL), or a file"
    )
    choice = group.add_mutually_exclusive_group()
    choice.add_argument("--describe", type=name, metavar="MODEL", help="name of the model")
    choice.add_argument("--texts", type=path, metavar="FILE", help='lines {"film", "task", "frames", "text"}')
    group.add_argument("--describe-cache", type=path, help="file of replies; by default replies.jsonl beside --out")
    group.add_argument(
        "--describe-rate", type=float, metavar="N", help="maximum number of requests per minute and worker"
    )
    group.add_argument(
        "--describe-requests", type=positive_int, default=4, metavar="N", help="concurrent requests of each worker"
    )
    group.add_argument("--describe-timeout", type=float, default=60.0, metavar="SECONDS")


def _add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--records", type=positive_int, default=10_000, help="number of training records")
    parser.add_argument("--test-records", type=positive_int, default=100, help="number of test records per task")
    parser.add_argument(
        "--shares", nargs="+", metavar="TASK=SHARE", help="share of each task, for example matching=0.5 location=0.5"
    )
    parser.add_argument(
        "--names", choices=NAMINGS, default="drawn", help="names drawn anew for each record, or those of the folders"
    )
    parser.add_argument(
        "--question", type=name, default="What is {name} doing?", help="question about the activity of a person"
    )


def run(arguments: argparse.Namespace) -> int:
    """Build the data set and print what it holds and what was left out."""
    source = _source(arguments)
    description = build_tuning_data(
        source,
        arguments.out,
        scenes=arguments.scenes,
        workers=arguments.workers,
        engine=arguments.engine,
        limit=getattr(arguments, "limit", None),
        compare=arguments.held_out,
        progress=not arguments.quiet,
    )
    print("\n".join(_summary(arguments.out, description)))
    return 0


def _source(arguments: argparse.Namespace) -> TuningSource:
    kind = arguments.build_source
    published = getattr(arguments, "as_published", False)
    if published and arguments.held_out:
        raise ValueError("--held-out has no effect with --as-published, which trains on everything; omit one of them.")
    splits = Splits(arguments.val, arguments.test, read_held_out(arguments.held_out))
    ours = {"seed": arguments.seed, "distractors": arguments.distractors, "splits": splits}
    if kind == "vcr":
        return VCR(arguments.annotations, arguments.images, as_published=published, **ours)
    if kind == "flickr30k":
        if published:
            return PublishedFlickr30k(arguments.annotations, arguments.images, seed=arguments.seed)
        return Flickr30kEntities(arguments.annotations, arguments.images, **ours)
    if kind == "refcoco":
        categories = None if arguments.categories == ["all"] else arguments.categories
        options = {"categories": categories, "as_published": published}
        return RefCOCO(arguments.annotations, arguments.images, **options, **ours)
    if kind == "movienet":
        return _movienet(arguments, ours, published)
    return PhotoFolder(
        arguments.annotations,
        arguments.images,
        records=arguments.records,
        test_records=arguments.test_records,
        shares=_shares(arguments.shares),
        names=arguments.names,
        question=arguments.question,
        **ours,
    )


def _movienet(arguments: argparse.Namespace, ours: dict[str, Any], published: bool) -> MovieNet | PublishedMovieNet:
    describe, describer_name = None, None
    if arguments.texts is not None:
        describe = DescriptionFile(arguments.texts)
        describer_name = f"{arguments.texts.name} ({describe.fingerprint})"
    elif arguments.describe is not None:
        cache = arguments.describe_cache or arguments.out.with_name(f"{arguments.out.name}.replies.jsonl")
        describe = EndpointDescriber(
            arguments.describe,
            cache,
            requests_per_minute=arguments.describe_rate,
            concurrency=arguments.describe_requests,
            timeout=arguments.describe_timeout,
        )
        describer_name = arguments.describe
    films = arguments.films.read_text(encoding="utf-8").split() if arguments.films is not None else None
    options = {"describe": describe, "describer_name": describer_name, "tasks": arguments.tasks, "films": films}
    if published:
        return PublishedMovieNet(arguments.annotations, arguments.images, seed=arguments.seed, **options)
    return MovieNet(arguments.annotations, arguments.images, **options, **ours)


class EndpointDescriber:
    """Describes frames by a model at an OpenAI-compatible endpoint. Replies are kept in a file and not asked for again.

    Args:
        model: name of the model.
        cache: file of replies.
        requests_per_minute: maximum rate of one worker; None for no limit.
        concurrency: number of concurrent requests of one worker.
        timeout: seconds to wait for a reply.
    """

    def __init__(
        self,
        model: str,
        cache: Path,
        *,
        requests_per_minute: float | None = None,
        concurrency: int = 4,
        timeout: float = 60.0,
    ) -> None:
        self.options = {"model": model, "cache": cache, "requests_per_minute": requests_per_minute, "timeout": timeout}
        self.concurrency = concurrency
        self._local: dict[str, Any] = {}
        self._client()  # a missing OPENAI_BASE_URL is an error before anything is built
        self._local.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "concurrency": self.concurrency, "_local": {}}

    def __call__(self, requests: Sequence[DescriptionRequest]) -> list[str | None]:
        """Return the replies. A request that the endpoint refuses for good is an error that ends the build."""
        client = self._client()
        with ThreadPoolExecutor(self.concurrency) as pool, client.stop_on_error():
            futures = [pool.submit(lambda request: client.ask(request.messages()), request) for request in requests]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _client(self) -> Any:
        """The client of this process. Clients have locks, so each worker process makes its own."""
        from idavlm.evaluation.judge import JudgeClient

        if "client" not in self._local:
            self._local["client"] = JudgeClient(**self.options)
        return self._local["client"]


def _shares(pairs: Sequence[str] | None) -> dict[str, float] | None:
    if pairs is None:
        return None
    shares = {}
    for pair in pairs:
        task, _, share = pair.partition("=")
        if task in shares:
            raise ValueError(f"--shares names {task!r} twice; write each task once.")
        try:
            shares[task] = float(share)
        except ValueError:
            raise ValueError(f"--shares {pair!r} is not TASK=SHARE; write for example matching=0.5.") from None
    return shares


def _summary(out: Path, description: dict[str, Any]) -> list[str]:
    records = ", ".join(f"{count} {split}" for split, count in description["records"].items() if count)
    lines = [f"{out}: {records or 'no'} records, reader {description['reader']!r}"]
    lines += [f"  {count} x {what}" for what, count in description["counts"].items()]
    if description["dropped"]:
        lines.append("left out by the rules:")
        lines += [f"  {count} x {reason}" for reason, count in description["dropped"].items()]
    if description["problems"]:
        lines.append(f"{description['problems']} faults of the annotations, all in {out / PROBLEMS}:")
        with (out / PROBLEMS).open(encoding="utf-8") as file:
            lines += [f"  {line.strip()}" for _, line in zip(range(SHOWN_PROBLEMS), file, strict=False)]
    return lines
