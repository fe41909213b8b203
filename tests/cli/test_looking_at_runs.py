"""`runs`, `show`, `tail`, `stream` and `verify` on a real log."""

from __future__ import annotations

import json
from typing import Any

from nexactor.events.types import RewardAssigned


def test_runs_lists_every_run_with_its_counts(cli: Any) -> None:
    result = cli("runs")
    assert result.exit_code == 0, result.stderr
    header, first, second = result.stdout.splitlines()
    assert header.split() == [
        "run",
        "agent",
        "task",
        "status",
        "agents",
        "model",
        "tool",
        "tokens",
        "time",
        "reward",
    ]
    assert "lead" in first and "count the lines" in first and "finished" in first and "1 (1 failed)" in first
    assert first.endswith("0.75") and "tidy up" in second
    # Ids that start alike are printed as far as they differ.
    assert first.split()[0] == cli.first[:31] and second.split()[0] == cli.second[:31]


def test_runs_as_json_has_all_fields(cli: Any) -> None:
    (runs,) = cli.lines("runs", "--json")
    assert [r["run"] for r in runs] == [cli.first, cli.second]
    assert runs[0] | {"started": 0, "ended": 0, "updated": 0} == {
        "run": cli.first,
        "agent": "lead",
        "task": "count the lines",
        "labels": {"split": "train"},
        "status": "finished",
        "result": "there are three",
        "started": 0,
        "ended": 0,
        "updated": 0,
        "events": 16,
        "agents": 2,
        "activations": 3,
        "model_calls": 1,
        "model_calls_failed": 0,
        "tool_calls": 0,
        "tool_calls_failed": 1,
        "prompt_tokens": 20,
        "cached_tokens": 10,
        "completion_tokens": 5,
        "reward": 0.75,
    }
    assert runs[1]["reward"] is None


def test_runs_can_be_filtered_and_limited(cli: Any) -> None:
    assert cli.lines("runs", "--status", "running", "--json") == [[]]
    (newest,) = cli.lines("runs", "--limit", "1", "--json")
    assert [r["run"] for r in newest] == [cli.second]


def test_show_prints_the_tree_with_indices_of_the_runs_total_order(cli: Any) -> None:
    result = cli("show", cli.first)
    assert result.exit_code == 0, result.stderr
    text = result.stdout
    assert f"run {cli.first} finished" in text
    for part in (
        "16 events, 2 agents, 1 model call, 1 tool call, 20 + 5 tokens, 10 cached, 1 takeover",
        "1 agent lead",
        "4 model tiny",
        "20 + 5 tokens, 10 cached, policy v7",
        'read_file({"path": "a.txt"})',
        "6 tool read_file failed",
        "no such file",
        "8 agent worker",
        "10 taken over by node node-a",
        "= three",
        "= there are three",
        "reward 0.75 by checker (files 0.5)",
    ):
        assert part in text
    assert text.index("agent lead") < text.index("agent worker") < text.index("= there are three")


def test_show_accepts_a_unique_start_of_an_id_or_last(cli: Any) -> None:
    assert cli.lines("show", cli.first[:31], "--json")[0]["summary"]["run"] == cli.first
    assert cli.lines("show", "last", "--json")[0]["summary"]["run"] == cli.second


def test_tail_from_the_start_prints_every_event_once_in_order(cli: Any) -> None:
    events = cli.lines("tail", "--from", "start", "--no-follow", "--json")
    assert len(events) == 31
    cursors = [int(e["cursor"]) for e in events]
    assert cursors == sorted(set(cursors))
    assert events[1]["type"] == "RunStarted" and events[1]["body"]["task"] == "count the lines"
    rest = cli.lines("tail", "--from", events[9]["cursor"], "--no-follow", "--json")
    assert rest == events[10:]


def test_tail_can_show_one_run_and_prints_lines_for_people(cli: Any) -> None:
    result = cli("tail", "--run", "last", "--from", "start", "--no-follow")
    lines = result.stdout.splitlines()
    assert len(lines) == 15
    assert f"agent/{cli.second}@2 RunStarted task=tidy up" in lines[1]
    assert cli.first not in result.stdout


def test_tail_of_new_events_only_is_empty_at_the_head(cli: Any) -> None:
    assert cli.lines("tail", "--no-follow", "--json") == []


def test_stream_writes_rewarded_runs_token_by_token(cli: Any) -> None:
    (line,) = cli.lines("stream", "--from", "start")
    assert (line["run"], line["reward"], line["labels"]) == (cli.first, 0.75, {"split": "train"})
    lead = line["agents"][0]
    assert lead["segments"][0]["ids"] == [1, 2, 3, 4]
    assert lead["segments"][0]["mask"] == [0, 0, 1, 1]
    assert lead["segments"][0]["logprobs"] == [0, 0, -0.5, -0.25]


def test_stream_says_on_stderr_what_it_waits_for(cli: Any) -> None:
    result = cli("stream")
    assert "1 trajectory; unfinished or without a reward: 1 run" in result.stderr


def test_stream_goes_on_exactly_after_the_cursor_of_a_line(cli: Any) -> None:
    both = cli.lines("stream", "--unrewarded")
    assert [t["run"] for t in both] == [cli.first, cli.second]
    assert cli.lines("stream", "--unrewarded", "--from", both[0]["cursor"]) == both[1:]
    assert cli.lines("stream", "--unrewarded", "--from", both[1]["cursor"]) == []


def test_stream_gives_a_run_that_overlapped_an_emitted_one_once_its_reward_came(cli: Any) -> None:
    (line,) = cli.lines("stream")
    assert cli.lines("stream", "--from", line["cursor"]) == []
    cli.write([(f"annotation/{cli.second}", [RewardAssigned(run=cli.second, reward=1.0, source="me")])])
    (next_line,) = cli.lines("stream", "--from", line["cursor"])
    assert (next_line["run"], next_line["reward"]) == (cli.second, 1.0)
    assert [t["run"] for t in cli.lines("stream")] == [cli.first, cli.second]


def test_verify_of_a_sound_log_is_exit_code_0(cli: Any) -> None:
    result = cli("verify")
    assert result.exit_code == 0, result.stderr
    assert "verified: 31 events in 5 streams" in result.stdout
    (report,) = cli.lines("verify", cli.first, "--json")
    assert report["ok"] and report["events"] == 16


def test_verify_against_a_ledger_that_knows_more_is_exit_code_1(cli: Any) -> None:
    ledger = cli.data / "ledger.jsonl"
    ledger.write_text(json.dumps({"stream": f"agent/{cli.first}", "version": 99, "hash": "00"}) + "\n")
    result = cli("verify", "--ledger", str(ledger))
    assert result.exit_code == 1
    assert "1 problems" in result.stdout and "the ledger says that it was acknowledged" in result.stdout
