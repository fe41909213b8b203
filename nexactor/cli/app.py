"""How commands end: errors on one screen with exit code 2, Ctrl-C with 130; and global options anywhere."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.text import Text

from nexactor.cli.context import Settings
from nexactor.events.errors import NexactorError

OPTIONS = ("--data", "--nats-url", "--namespace", "--journal")
FLAGS = ("--debug",)

EXTRAS = {
    **dict.fromkeys(
        ("gguf", "jax", "jaxlib", "matplotlib", "numpy", "optax", "orbax", "safetensors", "tokenizers"),
        "learner",
    ),
    "mcp": "mcp",
    **dict.fromkeys(("accelerate", "torch", "transformers"), "torch"),
    **dict.fromkeys(("fsspec", "pyarrow"), "archive"),
}
"""Which extra brings a module that the core does not need."""

MAX_LINES = 20
"""Lines of an error that are shown without --debug: one screen."""


class Commands(typer.core.TyperGroup):
    """A command group that reports what nexactor raises on purpose, and takes its options before or after a command."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, hoisted(args))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        except (NexactorError, ModuleNotFoundError, BaseExceptionGroup) as error:
            if any(isinstance(e, KeyboardInterrupt) for e in leaves(error)):
                raise typer.Exit(130) from None
            messages = explain(error)
            if messages is None:
                raise
            settings = ctx.find_object(Settings)
            if settings is not None and settings.debug:
                raise
            show_error("\n".join(messages))
            raise typer.Exit(2) from None


def hoisted(args: list[str]) -> list[str]:
    """`args` with the global options moved to the front, up to a `--`."""
    front: list[str] = []
    rest: list[str] = []
    queue = list(args)
    while queue:
        word = queue.pop(0)
        if word == "--":
            rest += [word, *queue]
            break
        if word in FLAGS or word.startswith(tuple(f"{o}=" for o in OPTIONS)):
            front.append(word)
        elif word in OPTIONS:
            front += [word, *queue[:1]]
            del queue[:1]
        else:
            rest.append(word)
    return front + rest


def leaves(error: BaseException) -> list[BaseException]:
    """The exceptions of a group, of any depth; of another exception, itself."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for inner in error.exceptions for leaf in leaves(inner)]
    return [error]


def explain(error: BaseException) -> list[str] | None:
    """The messages for a person, without repeats; None if something in it is a bug, which deserves its traceback."""
    messages: list[str] = []
    for leaf in leaves(error):
        if isinstance(leaf, NexactorError):
            message = str(leaf)
        elif isinstance(leaf, ModuleNotFoundError) and (name := (leaf.name or "").split(".")[0]) in EXTRAS:
            extra = EXTRAS[name]
            message = f"this command needs {name}, which is not installed: pip install 'nexactor[{extra}]'"
        else:
            return None
        if message not in messages:
            messages.append(message)
    return messages


def show_error(message: str) -> None:
    """Print an error on stderr, in red, at most one screen of it."""
    lines = message.splitlines() or ["(no message)"]
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES], f"... {len(lines) - MAX_LINES} more lines; --debug shows all"]
    text = Text("error: ", style="bold red").append("\n".join(lines), style="red")
    Console(stderr=True, soft_wrap=True).print(text)


def global_options(
    context: typer.Context,
    data: Annotated[
        Path,
        typer.Option(
            envvar="NEXACTOR_DATA", metavar="DIR", help="Folder of the log and the embedded broker."
        ),
    ] = Path(".nexactor"),
    nats_url: Annotated[
        str | None,
        typer.Option(
            envvar="NEXACTOR_NATS_URL",
            metavar="URL",
            help="A NATS server to use instead of the embedded one.",
        ),
    ] = None,
    namespace: Annotated[
        str, typer.Option(envvar="NEXACTOR_NAMESPACE", help="Separates projects on one server.")
    ] = "default",
    journal: Annotated[
        Path | None,
        typer.Option(
            envvar="NEXACTOR_JOURNAL",
            metavar="DIR",
            help="Keep ledgers of acknowledged appends (see verify).",
        ),
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Log everything; tracebacks for errors.")] = False,
) -> None:
    """Agents act, the log remembers, the policy learns.

    Global options may stand before or after the command. Exit codes: 0 fine, 1 the answer is no (a check failed),
    2 an error, 130 interrupted.
    """
    context.obj = Settings(data, nats_url or None, namespace, debug, journal)
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
