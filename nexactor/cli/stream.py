"""`nexactor stream`: finished runs as token-level trajectories, one JSON object a line, for any trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nexactor.cli.context import open_log, run_async, settings_of
from nexactor.cli.present import count, to_json
from nexactor.events.errors import ConfigError

if TYPE_CHECKING:
    from nexactor.events.trajectory import Trajectory


def parse_cursor(text: str) -> tuple[int, int]:
    """Where to read from, and up to which position trajectories were seen: `safe:seen`, a log cursor, or `start`.

    Runs overlap: to go on after a trajectory that ended at `seen`, one must read from before the oldest run that
    was open then, `safe`, and leave out what ended by `seen`.
    """
    from nexactor.events.cursor import Cursor

    safe, colon, seen = text.partition(":")
    first = Cursor.parse(safe).positions
    second = Cursor.parse(seen).positions if colon else first
    if len(first) != 1 or len(second) != 1 or second < first or (colon and not seen):
        raise ConfigError(f"{text!r} is not a cursor of `nexactor stream`: use a line's `cursor`, or 'start'")
    return first[0], second[0]


def stream(
    context: typer.Context,
    start: Annotated[
        str,
        typer.Option("--from", metavar="CURSOR", help="`start`, or the `cursor` of the last line you have."),
    ] = "start",
    follow: Annotated[
        bool, typer.Option("--follow", help="Wait for more instead of stopping at the head.")
    ] = False,
    rewarded: Annotated[
        bool,
        typer.Option(
            "--rewarded/--unrewarded", help="Emit a run once it has a reward, or as soon as it has ended."
        ),
    ] = True,
) -> None:
    """Write finished runs as trajectories: token ids, masks, log-probabilities, messages, rewards.

    One JSON object a line on stdout, progress on stderr. Each line's `cursor` goes on exactly after it: no trajectory
    twice, none left out. Other runs' `--from` must be used with the same --rewarded or --unrewarded.
    """
    safe, seen = parse_cursor(start)

    async def read() -> None:
        from nexactor.events.cursor import Cursor
        from nexactor.events.log import Filter
        from nexactor.events.segments import to_json as trajectory_json
        from nexactor.events.trajectory import TRAJECTORY_TYPES, AssemblerState, TrajectoryAssembler

        assembler = TrajectoryAssembler(AssemblerState(cursor=safe, seen=seen), wait_for_reward=rewarded)
        status = Console(stderr=True)
        written = 0

        def write(trajectory: Trajectory) -> None:
            nonlocal written
            cursor = f"{assembler.safe_cursor}:{trajectory.position}"
            typer.echo(to_json({"cursor": cursor, **trajectory_json(trajectory)}))
            written += 1

        settings = settings_of(context)
        async with open_log(settings) as log:
            with status.status("reading the log") as spinner:
                wanted = Filter(types=TRAJECTORY_TYPES)
                async for recorded in log.subscribe(Cursor((safe,)), filter=wanted, follow=follow):
                    for trajectory in assembler.add(recorded):
                        if trajectory.position > seen:
                            write(trajectory)
                            spinner.update(f"{written} trajectories, {assembler.open_runs} runs open")
        done = "1 trajectory" if written == 1 else f"{written} trajectories"
        open_runs = assembler.open_runs
        waiting = f"; unfinished or without a reward: {count(open_runs, 'run')}" if open_runs else ""
        status.print(f"{done}{waiting}", style="dim", highlight=False)

    run_async(read())
