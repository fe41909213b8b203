"""nexactor: an asyncio actor system with event sourcing for LLM agents that learn."""
