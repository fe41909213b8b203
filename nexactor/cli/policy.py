"""`nexactor policy get | serve | export`."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from nexactor.cli.context import Settings, open_log, run_async, settings_of, until_stopped
from nexactor.cli.present import to_json
from nexactor.events.errors import ConfigError

if TYPE_CHECKING:
    from nexactor.events.types import PolicyPublished
    from nexactor.learner.server import PolicyServer

app = typer.Typer(no_args_is_help=True)

NAME = "A known name (smollm2-135m, tiny), a Hugging Face id, a folder or a .gguf file."


@app.command(epilog="Example: nexactor policy get smollm2-135m")
def get(
    name: Annotated[str, typer.Argument(metavar="NAME", help=NAME)],
    json: Annotated[bool, typer.Option("--json", help="Name and path as one JSON object.")] = False,
) -> None:
    """Fetch a policy to this machine, and print where it is. The second time is instant."""
    from nexactor.learner.fetch import get_policy

    path = get_policy(name)
    typer.echo(to_json({"name": name, "path": str(path)}) if json else str(path))


@app.command(epilog="Example: nexactor policy serve smollm2-135m --port 8000")
def serve(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="[POLICY]", help=NAME)] = "smollm2-135m",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    slots: Annotated[int, typer.Option(min=1, help="Answers that are sampled at once.")] = 16,
    max_len: Annotated[int, typer.Option(min=16, help="Tokens of a prompt and its answer, at most.")] = 2048,
    follow: Annotated[
        bool, typer.Option(help="Serve the newest policy published in the log, as new ones come.")
    ] = True,
    json: Annotated[bool, typer.Option("--json", help="Say that it is ready as one JSON line.")] = False,
) -> None:
    """Serve a policy behind an OpenAI-compatible endpoint; new weights are swapped in while it answers.

    Ends at SIGTERM or Ctrl-C, once the answers in flight are finished. Kept answers lie in DATA/policy.
    """
    settings = settings_of(context)

    def ready(server: PolicyServer) -> None:
        if json:
            typer.echo(to_json({"ready": True, "url": server.url, "policy_version": server.version}))
            return
        Console(highlight=False).print(
            f"policy [bold]{server.version}[/bold] answers at [bold]{server.url}[/bold]; Ctrl-C ends it\n"
            f"  export OPENAI_BASE_URL={server.url} OPENAI_API_KEY=none"
        )

    async def answer() -> None:
        from nexactor.learner.fetch import resolve_policy
        from nexactor.learner.server import serve as serve_policy

        path = resolve_policy(name)
        async with AsyncExitStack() as stack:
            log = await stack.enter_async_context(open_log(settings, must_exist=False)) if follow else None
            await serve_policy(
                path,
                host,
                port,
                data=settings.data / "policy",
                log=log,
                slots=slots,
                max_len=max_len,
                on_ready=ready,
            )

    run_async(until_stopped(answer()))


@app.command(epilog="Example: nexactor policy export last ./my-model")
def export(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(metavar="POLICY", help=f"`last`, a version published in the log, or: {NAME}")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder.")],
    json: Annotated[bool, typer.Option("--json", help="Where it is and its digest, as JSON.")] = False,
) -> None:
    """Write a policy as a Hugging Face folder, which transformers, vLLM and SGLang load."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not an empty folder: name a new one")
    published = run_async(find_published(settings_of(context), source))
    began = time.perf_counter()
    from nexactor.learner.fetch import resolve_policy
    from nexactor.learner.weights import folder_digest, load_policy, save_policy

    if published is None:
        path = resolve_policy(source)
    else:
        path = Path(published.path)
        if not path.is_dir() or folder_digest(path) != published.digest:
            raise ConfigError(
                f"policy {published.version} is not at {path} as it was published; choose another version"
            )
    digest = save_policy(load_policy(path), folder)
    if json:
        typer.echo(to_json({"path": str(folder), "digest": digest}))
    else:
        size = sum(f.stat().st_size for f in folder.iterdir())
        Console(highlight=False, soft_wrap=True).print(
            f"{folder}: {size / 1e6:.0f} MB in {time.perf_counter() - began:.1f} s, digest {digest[:16]}"
        )


async def find_published(settings: Settings, version: str) -> PolicyPublished | None:
    """The log's newest policy of that version (`last`: of any), None if there is no such log or version."""
    from nexactor.events.cursor import START
    from nexactor.events.log import Filter
    from nexactor.events.types import PolicyPublished

    if settings.url is None and not (settings.data / "broker").is_dir() and version != "last":
        return None
    found = None
    async with open_log(settings) as log:
        async for recorded in log.subscribe(START, filter=Filter(types=("PolicyPublished",)), follow=False):
            event = recorded.event
            if isinstance(event, PolicyPublished) and version in ("last", event.version):
                found = event
    if found is None and version == "last":
        raise ConfigError("no policy was published in this log yet: `nexactor learn run CONFIG` does")
    return found
