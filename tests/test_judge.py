"""The judge, end to end against a local endpoint that simulates typical failures."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from idavlm.evaluation.judge import JudgeClient, JudgeError, judge_answers, judge_pairs, parse_score, parse_winner
from idavlm.evaluation.results import EvaluationResult, Prediction
from idavlm.evaluation.tasks import Item
from tests.evaluation_fakes import samples
from tests.judge_server import JudgeServer

SCORES = [
    ("10/10", 10), ("Score: 7", 7), ("7", 7), ("7.", 7), ("**Score: 8**", 8), ("Rating: 9/10", 9), ('{"score": 6}', 6),
    ('{"reason": "2 of 3 names", "score": 10}', 10), ("The answer is good.\nScore: 10", 10), ("Score: 10\n", 10),
    ("On a scale of 1 to 10, I give 4/10.", 4), ("Score: 8 out of 10", 8), ("8 out of ten", 8), ("8.5/10", 8.5),
    ("Score (1-10): 6", 6), ("评分:8", 8), ("Score: [[9]]", 9), ("The score is 5.", 5), ("5\nBecause he stands.", 5),
    ("Two names are right.\n6", 6), ("First I thought of Score: 3, but no.\nScore: 5", 5), ("Score: 7/10", 7),
    ("<think>maybe 3/10</think>Score: 9", 9), ("Names 2/3, actions 1/3.\nScore: 4", 4), ("Grade: 1", 1), ("(3)", 3),
    ("7 points", 7), ("Score = 2", 2), ("score of 6", 6), ("Score: ** 10 **", 10),
    ("I'm sorry, I cannot judge this.", None), ("", None), ("11/10", None), ("0", None), ("0/10", None), ("3/5", None),
    ("Score: 3/5", None), ("There are 2 people in it.", None), ("Score: 100", None), ("Score: 1-10", None),
    ("On a scale of 1 to 10 it is fine.", None), ("Score: high", None),
    # several numbers: the overall one counts
    ("Accuracy: 8/10\nCompleteness: 6/10\nOverall: 7/10", 7), ("Overall: 7/10\n\nAccuracy: 8/10\nDetail: 6/10", 7),
    ('{"accuracy": 8, "detail": 6, "overall": 7}', 7), ('{"overall_score": 7, "identity_score": 9}', 7),
    ('{"scores": {"identity": 9, "action": 5}, "overall": {"score": 7}}', 7),
    ("**Overall Score: 7**\n- identity: 9\n- action: 5", 7), ("Identity: 9, action: 5. Final score: 7", 7),
    ("Score for identity: 9/10. Score for actions: 5/10. Total score: 7/10", 7),
    ("I would say 8/10 for style but 3/10 overall.", 3), ("Score: 7 (8 for names, 6 for actions)", 7),
    ("Score: 7\nConfidence: 9/10", 7), ("Score: 8/10, not 9/10", 8),
    ("The answer misses one name. I deduct 3 points from 10, so the score is 7.", 7), ("10 - 3 = 7\nScore: 7", 7),
    ("| Criterion | Score |\n|---|---|\n| Identity | 9 |\n| Action | 5 |\n| **Overall** | **7** |", 7),
    ("Overall assessment: the answer names both people. Score: 7", 7),
    ("Overall, the answer deserves a score of 4 out of 10.", 4),
    ("Overall: s\u0131x", None),  # with a dotless i, which matches "i" if case is ignored
    ("Ground truth has 2 people; the answer has 1.\n\nScore: 5", 5),
    ("Score: 7\n\nNote: A score of 10 would need both names.", 7),
    ("A score of 10 would need both names. Score: 6", 6),
    ("Score: 9. Wait, the second name is wrong. Score: 4", 4), ("My rating is 7, as 3 of 10 details are wrong.", 7),
    ("Reason: 9 of 10 names are right.\nScore: 9", 9), ("Final verdict: 7", 7), ("Final: 8/10", 8),
    # JSON, tags, LaTeX, Markdown, thinking
    ('```json\n{"score": 7, "reason": "2 of 3 people are right"}\n```', 7), ("{'score': 7}", 7),
    ('{"rating": "7/10"}', 7), ('{"reason": "score 3 at first", "final_score": 8}', 8), ('{"score": null}', None),
    ('{"score": 7, "reason": "the names', 7), (r"\boxed{7}", 7), (r"Score: $\boxed{7}$", 7),
    (r"\textbf{Score: 7}", 7), ("<score>7</score>", 7), ("<answer>7</answer>", 7), ("Rating: [[7]]", 7),
    ("[[7]]", 7), ("**Score:** 7", 7), ("**Score**: 7/10", 7), ("## Score\n7", 7), ("### Rating: **7** / 10", 7),
    ("Maybe 3/10, for the names.</think>Score: 8", 8), ("<think>Score: 3", None), ("Score: 8<|im_end|>", 8),
    ("\uff17", 7), ("7\ufe0f\u20e3", 7), ("score=7", 7), ("Score: 7.5", 7.5), ("Score: seven", 7),
    # prose and other languages
    ("I'd rate this a 7.", 7), ("I rate it 7 out of 10.", 7), ("This deserves a 6.", 6), ("I would give it a 9.", 9),
    ("评分：8分", 8), ("总分：7/10，准确性：9/10", 7), ("得分: 6", 6), ("综合评分：7", 7), ("8分", 8), ("スコア: 7", 7),
    ("総合評価: 7/10", 7), ("점수: 8", 8), ("총점: 7/10", 7), ("Puntuación: 7", 7), ("Puntuación general: 7/10", 7),
    ("Note : 8/10", 8), ("Note globale : 7/10", 7), ("Bewertung: 6", 6), ("Gesamtbewertung: 7/10", 7),
    ("Оценка: 7", 7), ("Nota: 9", 9), ("Pontuação: 6", 6),
    # no score of this scale
    ("I can't score this.", None), ("Score: N/A", None), ("Score: -3", None), ("Score: 12", None),
    ("I'd need the image to judge it.", None), ("Names: 2/3, actions: 1/3", None),
    ("The overall quality is good.", None), ("Score: 85/100", None), ("8/5", None),
    ("Accuracy: 8/10\nCompleteness: 6/10", None),
    # as Qwen3-VL, InternVL 3.5, Gemma 3, GPT, Claude and thinking models write, in several languages
    ("**Score: 8/10**\n\nThe answer names both characters.", 8), ("Score: 8/10 ✅", 8), ("⭐ 8/10", 8),
    ("**8/10**", 8), ("### Score\n\n**8 / 10**", 8),
    ("The answer swaps Kate and Tom, which is a critical error.\nScore: 2", 2),
    ("Both actions match the ground truth.\n\nScore: **10**", 10),
    ("Kate is pouring tea in both. Tom is missing (1 of 2 characters).\nScore: 5", 5),
    ("<think>\nThe answer says Tom pours tea. Score: 3? Let me see, maybe 2.\n</think>\n\nTom does not p"
     "our tea.\nScore: 2", 2),
    ("Okay, I'd say a 4.\n</think>\nOnly one of two people is right.\nScore: 4", 4),
    ('{"reason": "Kate is right, Tom is not (1/2).", "score": 5}', 5),
    ('```json\n{\n  "reasoning": "...",\n  "score": 9\n}\n```', 9), ('{"score": "8"}', 8),
    ('{"evaluation": {"score": 7}}', 7), ("Score: 6 — the answer omits the second character.", 6), ("Score - 6", 6),
    ("Score → 6", 6), ("Final Score: 6/10", 6), ("**Final Answer: 6**", 6), ("My score: 6", 6),
    ("I'll give it a 7/10.", 7), ("I'd give this a 7 out of 10.", 7), ("Therefore, I assign a score of **3**.", 3),
    ("I assign it 3 points.", 3), ("The score I assign is 3.", 3), ("Score: 10 (fully agrees)", 10),
    ("Score: 1 (not at all)", 1), ("$\\text{Score: } 7$", 7), ("Score: \\boxed{7}", 7),
    ("Score: 7\n\n---\n*Note: the answer has 3 more details.*", 7),
    ("Reason: The answer mentions 2 of the 3 details.\nScore: 7", 7),
    ("1. Names: correct\n2. Actions: wrong\n\nScore: 4", 4), ("理由：人物正确，动作错误。\n评分：4", 4),
    ("得分：4/10", 4), ("分数：4", 4), ("最终评分：8", 8), ("我给8分。", 8), ("理由: 一致しています。\nスコア: 9", 9),
    ("点数：9点", 9), ("9点です。", 9), ("Begründung: Kate stimmt, Tom nicht.\nPunktzahl: 5", 5),
    ("Bewertung: 5/10", 5), ("Punkte: 5", 5), ("السبب: الإجابة صحيحة.\nالدرجة: 9", 9), ("التقييم: ٩/١٠", 9),
    ("I'm not able to evaluate this without seeing the image.", None), ("Score: ?", None), ("Score: none", None),
    ("Kate: 8/10, Tom: 4/10", None),
]  # fmt: skip

WINNERS = [
    ("[[A]]", "A"), ("A is close, yet\n[[B]]", "B"), ("[[tie]]", "tie"), ("[[C]]", "tie"), ("B", "B"), ("b.", "B"),
    ("Verdict: A", "A"), ("Winner: tie", "tie"), ("[[A]] ... no: [[B]]", "B"), ("neither", None), ("", None),
    ("A dog runs.", None),
    ('{"winner": "A"}', "A"), ('```json\n{"verdict": "B", "reason": "A names Tom."}\n```', "B"),
    (r"\boxed{A}", "A"), ("<answer>B</answer>", "B"), ("**[[B]]**", "B"), ("<think>[[A]]?</think>[[B]]", "B"),
    ("A names Tom, so [[A]] is wrong? No.\n\n[[B]]", "B"), ("Answer A is better.", "A"), ("Answer B is better.", "B"),
    ("The better answer is B.", "B"), ("Both are equally good: [[tie]]", "tie"), ("It's a tie.", "tie"),
    ("[[A]]<|im_end|>", "A"), ("I can't judge this.", None), ("[[Tie]]", "tie"), ("**Winner:** B", "B"),
    ('{"winner": "tie"}', "tie"), ("Final verdict: [[A]]", "A"), ("答案B更好。", "B"), ("[A]", "A"),
    # as Qwen3-VL, InternVL 3.5, Gemma 3, GPT, Claude and thinking models write, in several languages
    ("Answer A attributes the tea to the right character, while answer B does not.\n[[A]]", "A"), ("**[[B]]**\n", "B"),
    ("[[ B ]]", "B"), ("[[A]].", "A"), ("`[[A]]`", "A"), ("Both answers are right.\n[[tie]]", "tie"),
    ("Both are wrong.\n**[[tie]]**", "tie"), ("[[TIE]]", "tie"), ("Tie", "tie"), ("tie.", "tie"),
    ("<think>[[A]] seems better... no, B names Tom.</think>\nB names Tom.\n[[B]]", "B"),
    ("A or B? A.</think>[[A]]", "A"), ("\\boxed{[[B]]}", "B"), ("\\boxed{\\text{tie}}", "tie"),
    ('{"reason": "A is closer", "winner": "A"}', "A"), ('{"better": "B"}', "B"), ('{"answer": "tie"}', "tie"),
    ('{"verdict": "[[B]]"}', "B"), ("Answer A is significantly better than Answer B.", "A"),
    ("Answer B is the better one.", "B"), ("I prefer answer B.", "B"), ("Answer B wins.", "B"), ("A wins.", "A"),
    ("The winner is Answer A.", "A"), ("Final verdict: B", "B"), ("**Verdict: tie**", "tie"),
    ("Neither is better: [[tie]]", "tie"), ("It is a tie.", "tie"), ("They are equally good.", "tie"),
    ("Answer A is not better than answer B.", None), ("回答A更好。", "A"), ("B更好", "B"),
    ("[[B]]，因为它说对了人物。", "B"), ("平局：[[tie]]", "tie"), ("回答Bの方が良いです。\n[[B]]", "B"),
    ("Antwort A ist besser.\n[[A]]", "A"), ("الإجابة A أفضل.\n[[A]]", "A"), ("I cannot compare them.", None),
    ("A dog and a Bear.", None), ("Answer A mentions Kate.", None),
]  # fmt: skip


@pytest.fixture
def client(tmp_path):
    def make(server, **options):
        options = {"cache": tmp_path / "judge.jsonl", "timeout": 0.3, "backoff": 0.002, "retries": 6, **options}
        return JudgeClient("stub", base_url=server.url, api_key="secret", **options)

    return make


def judged(number: int = 6) -> tuple[list[Item], EvaluationResult]:
    """Descriptions of ``number`` identities; the answer contains its own number."""
    found = [sample for sample in samples(max(number, 4)) if sample.task == "caption_single"][:number]
    items = [Item(sample, {"type": sample.task}) for sample in found]
    predictions = [
        Prediction(sample.id, sample.task, f"answer <{place}>", sample.answer, {"name_f1": 1.0})
        for place, sample in enumerate(found)
    ]
    return items, EvaluationResult(predictions)


@pytest.mark.parametrize(("reply", "score"), SCORES)
def test_parse_score(reply, score):
    assert parse_score(reply) == score


@pytest.mark.parametrize(("reply", "winner"), WINNERS)
def test_parse_winner(reply, winner):
    assert parse_winner(reply) == winner


def test_transient_errors_are_retried_and_replies_are_cached(client):
    faults = [429, 500, "hang", "cut", "short", "shape", "drop", 503, 429]
    with JudgeServer(lambda content: "10/10", faults) as server:
        assert client(server, retries=9).ask([{"role": "user", "content": "one"}]) == "10/10"
        assert len(server.asked) == len(faults) + 1
        again = client(server)
        assert again.ask([{"role": "user", "content": "one"}]) == "10/10"
        assert len(server.asked) == len(faults) + 1, "from the disk"
        assert server.headers[0]["Authorization"] == "Bearer secret"


def test_permanent_errors_are_not_retried(client):
    with JudgeServer(lambda content: "x", [401]) as server:
        with pytest.raises(JudgeError, match="HTTP 401"):
            client(server).ask([{"role": "user", "content": "one"}])
        assert len(server.asked) == 1
    with JudgeServer(lambda content: "x", [500] * 9) as server:
        with pytest.raises(JudgeError, match=r"no reply in 3 attempts; the last error: HTTP 500"):
            client(server, retries=2).ask([{"role": "user", "content": "one"}])
        assert len(server.asked) == 3


def test_answers_of_several_kinds_are_scored(client):
    replies = [
        "10/10",
        "Reason.\nScore: 7",
        {"content": None, "refusal": "I can't."},
        "I cannot judge.",
        "Score: 0",
        "3",
    ]
    by_number = {f"<{number}>": reply for number, reply in enumerate(replies)}

    def reply(content):
        return next(text for number, text in by_number.items() if number in content)

    with JudgeServer(reply, [429, 500, "cut"]) as server:
        items, result = judged(len(replies))
        scored = judge_answers(client(server), items, result, tasks=("caption_single",), workers=3)
    scores = [prediction.scores for prediction in scored.predictions]
    assert [score.get("judge") for score in scores] == [10, 7, None, None, None, 3]
    assert [score["judge_unscored"] for score in scores] == [0, 0, 1, 1, 1, 0]
    assert scored.summary["caption_single"]["metrics"]["judge"] == pytest.approx(20 / 3)
    assert all("Ground truth: Kate is" in content and "answer <" in content for content in server.answered)
    untouched = judge_answers(client(server), items, result, tasks=("qa_single",))
    assert untouched == result


def test_pairs_are_asked_in_both_orders(client):
    questions = [("q", "truth", f"good {number}", f"bad {number}") for number in range(3)]
    questions += [("q", "truth", "bad", "good"), ("q", "truth", "same", "same"), ("q", "truth", "mum", "x")]

    def reply(content):
        first = content.split("Answer A: ")[1].split("\n")[0]
        if "mum" in content:
            return "I'd rather not."
        return "[[A]]" if "good" in first else "[[B]]"

    with JudgeServer(reply) as server:
        verdicts = judge_pairs(client(server), questions)
        assert len(server.asked) == 2 * len(questions) - 2, "equal answers are not asked about"
    assert verdicts == ["A", "A", "A", "B", "tie", None]


def test_requests_keep_the_rate(client):
    with JudgeServer(lambda content: "5") as server:
        limited = client(server, requests_per_minute=1200)
        for number in range(5):
            limited.ask([{"role": "user", "content": str(number)}])
    assert server.times[-1] - server.times[0] >= 4 * 0.05 - 0.02, "never faster than asked for"


def test_endpoint_from_the_environment(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="export OPENAI_BASE_URL"):
        JudgeClient("m")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:1/v1/")
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    found = JudgeClient("m")
    assert (found.base_url, found.api_key) == ("http://localhost:1/v1", "k")
    assert "'k'" not in repr(found)
    with pytest.raises(ValueError, match="must begin with http"):
        JudgeClient("m", base_url="file:///etc/passwd")


def test_the_same_question_at_the_same_time_is_asked_once(client):
    with JudgeServer(lambda content: time.sleep(0.05) or "5") as server:
        shared = client(server)
        with ThreadPoolExecutor(6) as pool:
            assert set(pool.map(lambda _: shared.ask([{"role": "user", "content": "one"}]), range(6))) == {"5"}
        assert len(server.asked) == 1


def test_a_killed_run_resumes_without_repeating_requests(client, tmp_path):
    def reply(content):
        time.sleep(0.1)
        return "Score: 8"

    cache = tmp_path / "judge.jsonl"
    items, result = judged(12)
    with JudgeServer(reply) as server:
        program = os.fork()
        if program == 0:
            judge_answers(client(server, timeout=9), items, result, tasks=("caption_single",), workers=2)
            os._exit(0)
        while not cache.exists() or cache.read_bytes().count(b"\n") < 4:
            time.sleep(0.005)
        os.kill(program, signal.SIGKILL)
        os.waitpid(program, 0)
        kept = cache.read_bytes().count(b"\n")
        cache.write_bytes(cache.read_bytes() + b'{"key": "torn')
        time.sleep(0.3)
        asked = len(server.asked)
        assert 4 <= kept < 12
        for _ in range(2):
            scored = judge_answers(client(server, timeout=9), items, result, tasks=("caption_single",), workers=2)
            assert scored.summary["caption_single"]["metrics"]["judge"] == 8
            # Requests in flight at the kill are repeated; stored replies are not.
            assert len(server.asked) - asked == 12 - kept
