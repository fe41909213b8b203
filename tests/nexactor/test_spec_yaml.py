"""Agent files: what loads, and how each mistake points at its file, line and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexactor.events.errors import ConfigError
from nexactor.spec import LLMConfig
from nexactor.spec_yaml import load_spec

GOOD = """\
name: lead
description: leads
system_prompt: Lead.
llm_config:
  model: m
  base_url: ${env.URL}
  api_key: ${env.KEY}
  temperature: 0.5
tools:
  - binding: nexactor.tools.files:read_file
    name: read
sub_agents:
  - name: worker
    config_path: worker.yaml
stop_tools: [read]
max_iterations: 7
"""
WORKER = "name: worker\ndescription: works\nllm_config: {model: m}\n"
ENV = {"URL": "http://localhost:1/v1", "KEY": "secret"}


def _write(folder: Path, text: str = GOOD, **others: str) -> Path:
    (folder / "worker.yaml").write_text(WORKER)
    for name, content in others.items():
        (folder / f"{name}.yaml").write_text(content)
    path = folder / "agent.yaml"
    path.write_text(text)
    return path


def test_an_agent_loads_with_its_sub_agents(tmp_path: Path) -> None:
    tree = load_spec(_write(tmp_path), env=ENV)
    root = tree.root
    assert [t.name for t in root.tool_specs] == ["read", "worker"]
    assert root.llm == LLMConfig("m", base_url="http://localhost:1/v1", api_key="${env.KEY}", temperature=0.5)
    assert tree.all[root.sub_agents[0].spec].name == "worker"
    assert root.max_iterations == 7


def test_the_value_of_a_secret_is_not_in_the_spec(tmp_path: Path) -> None:
    assert "secret" not in repr(load_spec(_write(tmp_path), env=ENV))


def test_a_jinja_prompt_file_is_rendered_with_the_context(tmp_path: Path) -> None:
    (tmp_path / "p.j2").write_text("Hello {{ who }}.\n")
    text = "name: a\nllm_config: {model: m}\nsystem_prompt: p.j2\nsystem_prompt_type: jinja\ncontext: {who: you}\n"
    assert load_spec(_write(tmp_path, text)).root.system_prompt == "Hello you."


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            ("max_iterations", "max_iteration"),
            ["agent.yaml:16", "max_iteration", "did you mean 'max_iterations'"],
        ),
        (
            ("temperature", "temprature"),
            ["agent.yaml:8", "llm_config.temprature", "did you mean 'temperature'"],
        ),
        (("temperature: 0.5", "temperature: warm"), ["agent.yaml:8", "llm_config.temperature", "float"]),
        (("worker.yaml", "wroker.yaml"), ["agent.yaml:14", "sub_agents[0].config_path", "no file"]),
        (
            ("${env.URL}", "${env.NOT_SET}"),
            ["agent.yaml:6", "llm_config.base_url", "NOT_SET is not set", "export"],
        ),
        (("files:read_file", "files:reed_file"), ["agent.yaml:10", "tools[0].binding", "read_file"]),
        (("nexactor.tools.files", "nowhere.tools"), ["agent.yaml:10", "tools[0].binding", "nowhere"]),
        (
            ("stop_tools: [read]", "stop_tools: [raed]"),
            ["agent.yaml:15", "no tool 'raed'", "did you mean 'read'"],
        ),
        (("name: lead", "name: [lead"), ["agent.yaml", "not YAML"]),
        (("name: lead\n", ""), ["agent.yaml:1", "name"]),
        (("max_iterations: 7", "max_iterations: 0"), ["agent.yaml:16", "at least 1"]),
    ],
)
def test_a_mistake_points_at_file_line_and_key(
    tmp_path: Path, change: tuple[str, str], said: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        load_spec(_write(tmp_path, GOOD.replace(*change)), env=ENV)
    for part in said:
        assert part in str(error.value)


def test_a_missing_file_and_a_file_that_is_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_spec(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="mapping of keys"):
        load_spec(_write(tmp_path, "- 1\n"))


def test_a_cycle_of_sub_agents_is_named(tmp_path: Path) -> None:
    loop = WORKER + "sub_agents: [{name: lead, config_path: agent.yaml}]\n"
    path = _write(tmp_path)
    (tmp_path / "worker.yaml").write_text(loop)
    with pytest.raises(ConfigError, match=r"agent\.yaml -> worker\.yaml -> agent\.yaml"):
        load_spec(path, env=ENV)
