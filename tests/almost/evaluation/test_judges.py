# Copyright 2026 the peft-ext authors. Licensed under the Apache License, Version 2.0.
"""Judges, the chat judge against a server that speaks OpenAI's protocol; win rates of answers."""

from __future__ import annotations

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from peft_ext.rows import read_rows
from trl_ext.almost.evaluation.judges import AnswerPair, ChatJudge, Judgement, RewardJudge, parse_scores
from trl_ext.almost.evaluation.win_rate import compare


ASKED = AnswerPair("q", "a", "b")


@pytest.fixture
def endpoint():
    """A chat endpoint; `replies` are (status, text of the assistant or raw body), `requests` what came in."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append((self.path, dict(self.headers), body))
            status, text = server.replies.pop(0) if len(server.replies) > 1 else server.replies[0]
            content = callable(text) and text(body["messages"][-1]["content"]) or text
            reply = {"choices": [{"message": {"role": "assistant", "content": content}}]}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(reply if status == 200 else {"error": content}).encode())

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.requests, server.replies = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()
    server.server_close()


def test_a_chat_judge_asks_and_reads_scores(endpoint, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    endpoint.replies = [(200, "8 6.5\nThe first is more to the point.")]
    judge = ChatJudge("some-judge", endpoint.url + "/", api_key_variable="MY_KEY")
    assert judge.compare([AnswerPair("Why {x}?", "because", "dunno")]) == [Judgement(8, 6.5)]
    ((path, headers, body),) = endpoint.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "some-judge" and body["temperature"] == 0.2
    said = body["messages"][1]["content"]
    assert said.index("Why {x}?") < said.index("because") < said.index("dunno")


def test_failures_that_pass_and_unreadable_answers_are_tried_again(endpoint):
    endpoint.replies = [(503, "busy"), (200, "Both are fine."), (200, "3 4")]
    assert ChatJudge("j", endpoint.url, pause=0).compare([ASKED]) == [Judgement(3, 4)]
    assert len(endpoint.requests) == 3
    endpoint.replies = [(200, "Both are fine.")]
    assert ChatJudge("j", endpoint.url, attempts=2, pause=0).compare([ASKED]) == [Judgement(None, None)]


def test_failures_that_last_are_told(endpoint):
    endpoint.replies = [(500, "broken")]
    with pytest.raises(ValueError, match="failed 3 times; at last: 500 .*broken"):
        ChatJudge("j", endpoint.url, attempts=3, pause=0).compare([ASKED])
    endpoint.replies = [(401, "no such key")]
    endpoint.requests.clear()
    with pytest.raises(ValueError, match="refused model='j': 401 .*no such key.*OPENAI_API_KEY"):
        ChatJudge("j", endpoint.url, pause=0).compare([ASKED])
    assert len(endpoint.requests) == 1
    with pytest.raises(ValueError, match="failed 1 times"):
        ChatJudge("j", "http://127.0.0.1:9", attempts=1, timeout=5).compare([ASKED])
    with pytest.raises(ValueError, match="base_url='ftp"):
        ChatJudge("j", "ftp://x")


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 9", (8, 9)),
        ("\n 10, 7.5 \nsince", (10, 7.5)),
        ("**8 9**", (8, 9)),
        ("8/10 9/10", None),
        ("11 3", None),
        ("0 3", None),
        ("The scores are 8 and 9", None),
        ("8", None),
        ("", None),
    ],
)
def test_scores_are_read_off_the_first_line_only(text, scores):
    assert parse_scores(text) == (None if scores is None else Judgement(*scores))


class Scripted:
    """A judge of given scores: the longer answer is worth more, and the first place `bonus` more."""

    symmetric = False
    batch_size = 3

    def __init__(self, bonus: float = 0.0, unreadable: str = "-") -> None:
        self.bonus, self.unreadable, self.asked = bonus, unreadable, 0

    def compare(self, comparisons):
        self.asked += len(comparisons)
        return [
            Judgement(None, None) if self.unreadable in question else Judgement(len(first) + self.bonus, len(second))
            for question, first, second in comparisons
        ]


QUESTIONS = {1: "one", 2: "two", 3: "three", 4: "four"}
ANSWERS = {1: ["aaaa"], 2: ["aa"], 3: ["aaa"], 4: ["a"]}
BASELINE = {1: ["b"], 2: ["bb"], 3: ["bb"], 4: ["bbbb"]}


def test_both_orders_are_judged_and_ties_count_half():
    found = compare(QUESTIONS, ANSWERS, BASELINE, Scripted())
    assert (found["wins"], found["ties"], found["losses"]) == (4, 2, 2)
    assert found["win_rate"]["value"] == (1 + 0.5 + 1 + 0) / 4 and found["consistent"] == 1
    assert found["scores"] == [2 * 10, 2 * 9] and found["length"] == [2.5, 2.25]


def test_a_judge_that_likes_the_first_place_is_evened_out():
    found = compare(QUESTIONS, ANSWERS, BASELINE, Scripted(bonus=1.5))
    assert found["win_rate"]["value"] == (1 + 0.5 + 0.5 + 0) / 4
    assert found["consistent"] == 0.5


def test_unreadable_judgements_are_left_out_and_counted():
    found = compare(QUESTIONS, ANSWERS, BASELINE, Scripted(unreadable="three"))
    assert found["unreadable"] == 1 and found["win_rate"]["n"] == 3
    with pytest.raises(ValueError, match="none of the judge's 4"):
        compare(QUESTIONS, ANSWERS, BASELINE, Scripted(unreadable=""))


def test_judgements_are_kept_and_made_anew_for_other_answers(tmp_path):
    path, judge = tmp_path / "judgements.jsonl", Scripted()
    first = compare(QUESTIONS, ANSWERS, BASELINE, judge, path)
    assert judge.asked == 8 and len(read_rows(path)) == 8
    assert compare(QUESTIONS, ANSWERS, BASELINE, judge, path) == first and judge.asked == 8
    assert compare(QUESTIONS, {**ANSWERS, 4: ["aaaaaa"]}, BASELINE, judge, path)["wins"] == 6 and judge.asked == 10


def test_a_symmetric_judge_is_asked_once():
    class Rewards:
        def score(self, prompts, responses):
            return [float(len(response)) for response in responses]

    found = compare(QUESTIONS, ANSWERS, BASELINE, RewardJudge(Rewards()))
    assert (found["wins"], found["ties"], found["losses"]) == (2, 1, 1)
    assert found["reward"]["value"] == 2.5 and found["reward_difference"]["value"] == 0.25
    assert "reward" not in compare(QUESTIONS, ANSWERS, BASELINE, Scripted())


def test_several_answers_are_compared_one_by_one_and_averaged_by_question(tmp_path):
    answers, baseline = {1: ["aaaa", "a"], 2: ["aa", "aa"]}, {1: ["b", "bb"], 2: ["bb", "b"]}
    questions, path = {1: "one", 2: "two"}, tmp_path / "judgements.jsonl"
    found = compare(questions, answers, baseline, Scripted(), path)
    assert (found["wins"], found["ties"], found["losses"]) == (4, 2, 2)
    assert found["win_rate"]["value"] == (0.5 + 0.75) / 2 and found["win_rate"]["n"] == 2
    assert found["length"] == [2.25, 1.5] and found["scores"] == [2 * 9, 2 * 6]
    assert len(read_rows(path)) == 8
    one = compare(questions, answers, {1: ["b"], 2: ["bb"]}, Scripted())
    assert (one["wins"], one["ties"]) == (2, 6), "one answer of the baseline is every answer's"
    with pytest.raises(ValueError, match="question 2 has 3 answers and 2 of the baseline"):
        compare(questions, {**answers, 2: ["a", "a", "a"]}, baseline, Scripted())


def test_a_reward_judge_averages_a_question_s_rewards_and_scores_a_text_once():
    asked = []

    class Rewards:
        def score(self, prompts, responses):
            asked.extend(responses)
            return [float(len(response)) for response in responses]

    answers, baseline = {1: ["aaaa", "a"], 2: ["aa", "aaaaaa"]}, {1: ["b"], 2: ["bb"]}
    found = compare({1: "one", 2: "two"}, answers, baseline, RewardJudge(Rewards()))
    assert found["reward"] == {**found["reward"], "value": (2.5 + 4) / 2, "n": 2}
    assert found["reward_difference"]["value"] == (1.5 + 2) / 2
    assert sorted(asked) == ["a", "aa", "aaaa", "aaaaaa", "b", "bb"]


@pytest.mark.parametrize("better", [0.0, 0.5])
def test_a_reward_that_is_length_has_no_difference_left_at_equal_length(better):
    class Rewards:
        """The logarithm of the characters, and what the first letter is worth."""

        def score(self, prompts, responses):
            return [math.log(len(text)) + better * text.startswith("x") for text in responses]

    questions = {key: str(key) for key in range(6)}
    answers = {key: ["x" * (4 + key), "x" * (9 + key), "x" * 30] for key in questions}
    baseline = {key: ["y" * (2 + key), "y" * 5, "y" * (7 + key)] for key in questions}
    found = compare(questions, answers, baseline, RewardJudge(Rewards()))
    assert found["length_correlation"] == pytest.approx(1)
    assert found["reward_difference"]["value"] > better + 0.5
    assert found["reward_difference_at_equal_length"]["value"] == pytest.approx(better)
    one = [{key: texts[:1] for key, texts in each.items()} for each in (answers, baseline)]
    assert "length_correlation" not in compare(questions, *one, RewardJudge(Rewards())), (
        "one answer varies with nothing"
    )


def test_a_reward_judge_s_scores_are_kept_for_other_comparisons(tmp_path):
    class Rewards:
        asked = 0

        def score(self, prompts, responses):
            self.asked += len(responses)
            return [float(len(response)) for response in responses]

    rewards, path = Rewards(), tmp_path / "scores.jsonl"
    first = compare(QUESTIONS, ANSWERS, BASELINE, RewardJudge(rewards, path))
    asked = rewards.asked
    assert len(read_rows(path)) == asked
    assert compare(QUESTIONS, ANSWERS, BASELINE, RewardJudge(rewards, path)) == first and rewards.asked == asked
    compare(QUESTIONS, {**ANSWERS, 4: ["new one"]}, BASELINE, RewardJudge(rewards, path))
    assert rewards.asked == asked + 1, "the same answers against others need no further score"


def test_missing_answers_are_named():
    with pytest.raises(ValueError, match=r"baseline lacks question 4 \(1 of 4"):
        compare(QUESTIONS, ANSWERS, {key: BASELINE[key] for key in (1, 2, 3)}, Scripted())
    with pytest.raises(ValueError, match="answers lacks question 4"):
        compare(QUESTIONS, {**ANSWERS, 4: []}, BASELINE, Scripted())


def test_a_chat_judge_in_both_orders(endpoint):
    """End to end: the server scores by length, whatever the order."""

    def scores(content):
        first, second = (part.split("\n\n")[0].strip() for part in content.split("answer]")[1:])
        return f"{len(first)} {len(second)}"

    endpoint.replies = [(200, scores)]
    found = compare(QUESTIONS, ANSWERS, BASELINE, ChatJudge("j", endpoint.url))
    assert len(endpoint.requests) == 8 and found["consistent"] == 1
    assert found["win_rate"]["value"] == (1 + 0.5 + 1 + 0) / 4
