"""Real vLLM's OpenAI-compatible server on the CPU, with and without the store, and what ``make bench-engines`` measures of it."""
