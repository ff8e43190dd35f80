"""Missing features become samples: prompts, vLLM actors, and the loop that verifies what they write."""
