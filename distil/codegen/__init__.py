"""Python tasks: prompts, a model that writes code, a sandbox that runs it, judging."""
