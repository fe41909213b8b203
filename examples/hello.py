"""A tool, an agent, a run, its events. In a notebook, `await main()`.

With OPENAI_API_KEY (and OPENAI_BASE_URL, MODEL) set it talks to that endpoint; else a scripted model plays along.
"""

import asyncio
import os

from nexactor import Agent, LLMConfig, System, tool
from nexactor.testing import ScriptedModel, call


@tool(repeat="safe")
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


async def main() -> None:
    async with System() as system, ScriptedModel([call("add", a=17, b=25), "17 + 25 = 42"]) as scripted:
        real = LLMConfig(
            os.environ.get("MODEL", "gpt-5-mini"), base_url=os.environ.get("OPENAI_BASE_URL", "")
        )
        agent = Agent("adder", llm=real if "OPENAI_API_KEY" in os.environ else scripted.llm, tools=[add])
        run = await system.start(agent, "What is 17 + 25?")
        print((await run.wait()).result)
        async for recorded in run.events():
            print(f"{recorded.version:>3}  {recorded.stream}  {recorded.envelope.type}")


if __name__ == "__main__":
    asyncio.run(main())
