"""The main job: agents act, the log remembers, the policy learns, and processes are killed in between."""
