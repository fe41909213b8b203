"""What the README shows is what runs."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nexactor.cli.main import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_example_is_examples_hello() -> None:
    (shown,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert (ROOT / "examples" / "hello.py").read_text(encoding="utf-8").endswith(shown)


def test_every_link_and_script_of_the_readme_exists() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link]
    assert len(links) > 4
    assert [link for link in links if not (ROOT / link).exists()] == []
    for script in ("scripts/demo", "scripts/test", ".ci/run"):
        assert os.access(ROOT / script, os.X_OK)


def test_every_command_of_the_readme_exists() -> None:
    shown = set(re.findall(r"^nexactor (\w+)", README, re.M))
    known = {c.name for c in app.registered_commands} | {g.name for g in app.registered_groups}
    assert len(shown) > 4
    assert shown <= known
