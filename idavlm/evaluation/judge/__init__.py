"""A judge model behind an OpenAI-compatible endpoint."""

from idavlm.evaluation.judge.client import JudgeClient, JudgeError
from idavlm.evaluation.judge.judging import judge_answers, judge_pairs
from idavlm.evaluation.judge.verdicts import parse_score, parse_winner

__all__ = ["JudgeClient", "JudgeError", "judge_answers", "judge_pairs", "parse_score", "parse_winner"]
