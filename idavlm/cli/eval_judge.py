"""Command-line arguments of the judge, shared by ``idavlm eval TASK`` and ``idavlm eval compare``."""

import argparse
from pathlib import Path

from idavlm.evaluation.judge import JudgeClient


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
