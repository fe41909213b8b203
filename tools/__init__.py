"""What agents act with: the tool protocol, built-in tools, environments with checkers."""

from __future__ import annotations

from nexactor.tools.decorator import load_tool, tool
from nexactor.tools.environment import Environment, EnvironmentFault, Score, Task
from nexactor.tools.protocol import Repeat, Tool, ToolContext, ToolError, ToolResult

__all__ = [
    "Environment",
    "EnvironmentFault",
    "Repeat",
    "Score",
    "Task",
    "Tool",
    "ToolContext",
    "ToolError",
    "ToolResult",
    "load_tool",
    "tool",
]
