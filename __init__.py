"""kvlode: a storage engine for the KV cache of LLM inference."""
