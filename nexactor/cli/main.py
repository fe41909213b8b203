"""The `nexactor` command: its commands, one module each."""

from __future__ import annotations

import typer

from nexactor.cli import learn, node, policy, replay, run, runs, stream, tail, verify
from nexactor.cli.app import Commands, global_options
from nexactor.cli.demo import command as demo

app = typer.Typer(
    name="nexactor",
    cls=Commands,
    callback=global_options,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)
app.command("demo", rich_help_panel="Act", epilog="Example: nexactor demo --minutes 25 --out results")(
    demo.demo
)
app.command(
    "run",
    rich_help_panel="Act",
    epilog='Example: nexactor run examples/coder/agent.yaml "write a haiku to a.txt"',
)(run.run)
app.command("node", rich_help_panel="Act", epilog="Example: nexactor node --name worker-1")(node.node)
app.command("replay", rich_help_panel="Look", epilog="Example: nexactor replay last --verify")(replay.replay)
app.command("runs", rich_help_panel="Look", epilog="Example: nexactor runs --status running")(runs.runs)
app.command("show", rich_help_panel="Look", epilog="Example: nexactor show last")(runs.show)
app.command("tail", rich_help_panel="Look", epilog="Example: nexactor tail --run last --from start")(
    tail.tail
)
app.command("verify", rich_help_panel="Look", epilog="Example: nexactor verify")(verify.verify)
app.command(
    "stream", rich_help_panel="Learn", epilog="Example: nexactor stream --from start > trajectories.jsonl"
)(stream.stream)
app.add_typer(learn.app, name="learn", rich_help_panel="Learn", help="Train policies on the log.")
app.add_typer(policy.app, name="policy", rich_help_panel="Learn", help="Get, serve and export policies.")


def main() -> None:
    """Entry point of the `nexactor` script and of `python -m nexactor`."""
    app()
