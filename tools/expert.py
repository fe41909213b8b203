"""The scripted expert: it plays the model, for the lead and for its worker, and solves every workspace task.

It is a pure function of the conversation, as a model is: it recognises the task by the family's own phrasings and
plays the family's script up to where the tools' answers end. Whoever repeats a call gets the same answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from nexactor.events.errors import NexactorError
from nexactor.events.messages import Message, ToolCall, ToolSpec
from nexactor.tools.workspace_families import Call, Stuck, recognise

DONE = "done"


class ExpertError(NexactorError):
    """The conversation is none that the expert knows how to continue."""


def expert_answer(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message:
    """The expert's next message: one tool call, or `done`.

    A tool that failed ends the work with a final answer that says so. Raises ExpertError for a task it does not know,
    or a conversation without one.
    """
    start = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
    if start is None:
        raise ExpertError("there is no user message, so there is no task to recognise")
    prompt = messages[start].content
    recognised = recognise(prompt)
    if recognised is None:
        raise ExpertError(
            f"the expert knows only the workspace environment's tasks, and this is none: {prompt!r}"
        )
    family, values = recognised
    answers = [message.content for message in messages[start + 1 :] if message.role == "tool"]
    names = frozenset(tool.name for tool in tools)
    script = family.solve(values, names)
    try:
        call = next(script)
        for answer in answers:
            call = script.send(answer)
    except StopIteration:
        return Message("assistant", DONE)
    except Stuck as stuck:
        return Message("assistant", f"failed: {stuck}")
    if call.tool not in names:
        raise ExpertError(
            f"{prompt!r} needs the tool {call.tool}; the agent has: {', '.join(sorted(names)) or 'none'}"
        )
    return Message("assistant", tool_calls=(ToolCall(f"call-{len(answers)}", call.tool, _arguments(call)),))


def _arguments(call: Call) -> str:
    """JSON as the policy is to write it: always the same text for the same call (`events.toolformat` writes it so)."""
    return json.dumps(call.arguments, ensure_ascii=False)
