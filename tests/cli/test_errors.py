"""What a person can get wrong: one screen on stderr, exit code 2, no traceback."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from nexactor.cli.app import MAX_LINES, Commands, explain, global_options, hoisted
from nexactor.events.errors import ConfigError, NexactorError


def refused(result: Any, *parts: str) -> None:
    """The result is a clear error of one screen that says all of `parts`."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) <= MAX_LINES + 1
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("command", [["runs"], ["show", "last"], ["tail"], ["stream"], ["verify"]])
def test_a_folder_without_a_log_is_named_and_left_alone(cli: Any, tmp_path: Path, command: list[str]) -> None:
    refused(cli.bare("--data", str(tmp_path / "none"), *command), str(tmp_path / "none"), "--data")
    assert not (tmp_path / "none").exists()


def test_an_unreachable_broker_is_named_with_what_to_do(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexactor.events.broker.FIRST_CONNECT", 0.1)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"nats://secret@127.0.0.1:{closed.getsockname()[1]}"
        result = cli("--nats-url", url, "runs")
    refused(result, "no NATS server answers", "NEXACTOR_NATS_URL")
    assert "secret" not in result.stderr


def test_a_broker_that_is_too_old_is_named_with_its_version(
    cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("nexactor.events.embedded.OLDEST", (99, 0))
    refused(cli("runs"), "99.0", "nats-server")


def test_an_unknown_run_is_named(cli: Any) -> None:
    refused(cli("show", "ffff"), "'ffff'", "nexactor runs")


def test_an_ambiguous_start_of_a_run_id_lists_the_runs(cli: Any) -> None:
    refused(cli("show", "0192"), "2 runs start with '0192'", cli.first, cli.second)


@pytest.mark.parametrize("cursor", ["yesterday", "5:", "7:3", "-1", "1:2:3"])
def test_a_bad_cursor_is_named(cli: Any, cursor: str) -> None:
    refused(cli("stream", f"--from={cursor}"), "cursor")


def test_a_cursor_of_another_log_is_refused(cli: Any) -> None:
    refused(cli("stream", "--from", "99999999:99999999"), "99999999")


def test_an_unknown_status_lists_the_known_ones(cli: Any) -> None:
    refused(cli("runs", "--status", "done"), "'done'", "finished")


def test_a_bad_namespace_is_named(cli: Any) -> None:
    refused(cli("--namespace", "a b", "runs"), "'a b'")


def test_an_unreadable_ledger_is_named(cli: Any, tmp_path: Path) -> None:
    refused(cli("verify", "--ledger", str(tmp_path / "no.jsonl")), "no.jsonl")


@pytest.mark.parametrize("arguments", [["--bogus"], ["nonsense"], ["show"], ["runs", "--limit", "0"]])
def test_a_wrong_word_is_exit_code_2_with_usage(cli: Any, arguments: list[str]) -> None:
    result = cli(*arguments)
    assert result.exit_code == 2
    assert "Usage:" in result.stderr


@pytest.mark.parametrize("command", ["runs", "show", "tail", "stream", "verify"])
def test_every_command_has_help_with_an_example(cli: Any, command: str) -> None:
    result = cli(command, "--help")
    assert result.exit_code == 0
    assert f"Example: nexactor {command}" in result.stdout


def failing_with(error: BaseException) -> typer.Typer:
    """A command line like ours whose only command raises `error`."""
    app = typer.Typer(cls=Commands, callback=global_options, pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    return app


def test_errors_inside_task_groups_are_shown_once_each() -> None:
    inner = ExceptionGroup("a", [ConfigError("first"), ConfigError("first"), NexactorError("second")])
    result = CliRunner().invoke(failing_with(ExceptionGroup("b", [inner])), ["fail"])
    refused(result, "first", "second")
    assert result.stderr.count("first") == 1


def test_a_long_error_is_cut_to_one_screen() -> None:
    result = CliRunner().invoke(
        failing_with(ConfigError("\n".join(f"line {i}" for i in range(100)))), ["fail"]
    )
    refused(result, "line 19", "80 more lines; --debug shows all")
    assert "line 20" not in result.stderr


def test_debug_shows_the_traceback() -> None:
    result = CliRunner().invoke(failing_with(ConfigError("why")), ["--debug", "fail"])
    assert isinstance(result.exception, ConfigError)


def test_a_missing_extra_is_named_with_how_to_install_it() -> None:
    error = ModuleNotFoundError("No module named 'jax'", name="jax.numpy")
    refused(CliRunner().invoke(failing_with(error), ["fail"]), "jax", "pip install 'nexactor[learner]'")


def test_a_bug_keeps_its_traceback() -> None:
    assert explain(ExceptionGroup("x", [ConfigError("a"), ValueError("b")])) is None
    assert isinstance(CliRunner().invoke(failing_with(ValueError("b")), ["fail"]).exception, ValueError)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BaseExceptionGroup("x", [KeyboardInterrupt()])])
def test_interrupting_a_command_is_exit_code_130_without_a_word(error: BaseException) -> None:
    result = CliRunner().invoke(failing_with(error), ["fail"])
    assert result.exit_code == 130
    assert result.output == ""


def test_global_options_may_stand_after_the_command() -> None:
    words = ["show", "x", "--data", "d", "--json", "--nats-url=u", "--debug", "--", "--data", "e"]
    assert hoisted(words) == [
        "--data",
        "d",
        "--nats-url=u",
        "--debug",
        "show",
        "x",
        "--json",
        "--",
        "--data",
        "e",
    ]


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "nexactor", "runs", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "List runs" in done.stdout
