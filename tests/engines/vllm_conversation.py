"""A conversation with real vLLM in this process: ``python vllm_conversation.py OPTIONS TURNS``. The last line is its turns."""

from __future__ import annotations

import json
import sys
from typing import Any

from kvlode.tools.demo_vllm_step import VllmOptions, ask, prompt_of, start_vllm

FIRST_TOKENS, TURN_TOKENS = 300, 40


def conversation(options: VllmOptions, count: int) -> list[dict[str, Any]]:
    """Each turn asks with all that was said before."""
    llm = start_vllm(options)
    text = prompt_of(llm, FIRST_TOKENS + TURN_TOKENS * count)
    history, turns = text[:FIRST_TOKENS], []
    for turn in range(count):
        said = FIRST_TOKENS + TURN_TOKENS * turn
        history = history + text[said : said + TURN_TOKENS]
        answer = ask(llm, history, options.answer_tokens, f"turn-{turn}")
        turns.append({"tokens": answer.tokens, "restored_tokens": answer.restored_tokens, "prompt_tokens": len(history)})
        history = history + answer.tokens
    llm.llm_engine.engine_core.shutdown()
    return turns


if __name__ == "__main__":
    print("RESULT " + json.dumps(conversation(VllmOptions(**json.loads(sys.argv[1])), int(sys.argv[2]))))
