"""``idavlm eval compare A B``: compare two runs by score and list the items where they differ."""

import argparse
from pathlib import Path

from idavlm.data.schema import Sample
from idavlm.evaluation.answers import question_text
from idavlm.evaluation.comparison import (
    Pair,
    compare_scores,
    comparison_table,
    pair_predictions,
    write_comparison_page,
)
from idavlm.evaluation.judge import JudgeClient, judge_pairs
from idavlm.evaluation.task_run import load_scores
from idavlm.evaluation.tasks import TASKS


def add_arguments(tasks) -> None:
    """Add the subcommand ``compare`` to the subparsers ``tasks``."""
    description = "compare two runs on the same items: paired bootstrap, wins and losses, a page of examples"
    parser = tasks.add_parser("compare", help=description, description=description)
    parser.set_defaults(run_task=run)
    parser.add_argument("a", type=Path, help="folder that idavlm eval wrote (or its scores.json)")
    parser.add_argument("b", type=Path, help="another run of the same task and data")
    parser.add_argument("--names", nargs=2, metavar=("A", "B"), help="names of the runs; by default their folders")
    parser.add_argument("--out", type=Path, help=".html page of the items where they differ")
    parser.add_argument("--max-items", type=int, default=60, help="maximum number of items on the page")
    add_judge_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Print the comparison and write the page."""
    (a, facts), (b, other) = load_scores(arguments.a), load_scores(arguments.b)
    if facts.get("task") != other.get("task"):
        raise ValueError(f"a is of task {facts.get('task')!r}, b of {other.get('task')!r}; pass runs of the same task.")
    names = tuple(arguments.names or _names(arguments.a, arguments.b))
    pairs = pair_predictions(a, b)
    left_out = len(a.predictions) + len(b.predictions) - 2 * len(pairs)
    if left_out:
        print(f"{left_out} predictions are left out, because only one of the runs has their item.\n")
    rows = compare_scores(pairs)
    print(comparison_table(rows, *names))
    samples = _samples(facts)
    if (client := judge_client(arguments, arguments.b / "judge.jsonl")) is not None:
        tasks = TASKS[facts["task"]].judged
        print("\n" + _judge(client, [pair for pair in pairs if pair[0].task in tasks], samples, names, arguments))
    if arguments.out is not None:
        options = {"names": names, "samples": samples, "max_items": arguments.max_items}
        differ = write_comparison_page(arguments.out, pairs, rows, **options)
        print(f"\n{differ} items differ: {arguments.out}")


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--judge`` and its options."""
    group = parser.add_argument_group("judge", "an OpenAI-compatible endpoint: OPENAI_BASE_URL and OPENAI_API_KEY")
    group.add_argument("--judge", metavar="MODEL", help="name of the judge model")
    group.add_argument("--judge-cache", type=Path, help="file of replies; by default judge.jsonl next to the scores")
    group.add_argument("--judge-rate", type=float, metavar="N", help="maximum number of requests per minute")
    group.add_argument("--judge-workers", type=int, default=4, metavar="N", help="number of concurrent requests")
    group.add_argument("--judge-timeout", type=float, default=60.0, metavar="SECONDS")


def judge_client(arguments: argparse.Namespace, cache: Path) -> JudgeClient | None:
    """The client, or None without ``--judge``."""
    if arguments.judge is None:
        return None
    return JudgeClient(
        arguments.judge,
        cache=arguments.judge_cache or cache,
        requests_per_minute=arguments.judge_rate,
        timeout=arguments.judge_timeout,
    )


def _judge(
    client: JudgeClient, pairs: list[Pair], samples: dict[str, Sample], names: tuple[str, str], arguments
) -> str:
    if any(a.id not in samples for a, _ in pairs):
        raise ValueError(
            f"--judge needs the questions, but the data of run {names[0]} is not available; restore its path."
        )
    questions = [(question_text(samples[a.id]), a.answer, a.text, b.text) for a, b in pairs]
    verdicts = judge_pairs(client, questions, workers=arguments.judge_workers, progress=True)
    count = {verdict: verdicts.count(verdict) for verdict in ("A", "B", "tie", None)}
    return (
        f"Judge {client.model}, both orders, {len(pairs)} items: {names[0]} better {count['A']}, {names[1]} better "
        f"{count['B']}, ties (or the orders disagree) {count['tie']}, no verdict {count[None]}."
    )


def _samples(facts: dict) -> dict[str, Sample]:
    """Evaluated samples by id; {} if the data is no longer available."""
    task, data, images = TASKS.get(facts.get("task", "")), Path(facts.get("data", "")), facts.get("images")
    if task is None or not data.exists():
        print("\nThe data is no longer available at its path: questions and images are left out.")
        return {}
    return {item.sample.id: item.sample for item in task.load(data, Path(images) if images else None)}


def _names(a: Path, b: Path) -> tuple[str, str]:
    """The last components in which the paths differ."""
    for part_a, part_b in zip(reversed(a.resolve().parts), reversed(b.resolve().parts), strict=False):
        if part_a != part_b:
            return part_a, part_b
    return "A", "B"
