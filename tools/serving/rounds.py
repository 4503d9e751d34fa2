"""The measurements: rounds that alternate between a server with the store and one without, both running, one of them idle."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from ...format.errors import KvlodeError
from ..bench.figures import Bar, Item, abba
from ..bench.page_cache import forget_pages
from .clients import Texts, Timing, each_client, stream
from .figures import comparison, percentile
from .processes import usage_of, wait_idle
from .server import VllmServer

TOKENS_PER_S_BAR = Bar(0.97, "at least")
GAP_BAR = Bar(1.10, "at most")
BLOCK_TOKENS = 128
"""vLLM's block size on the CPU unless it is told otherwise."""
RESET_TIMEOUT_S = 60.0
MILLISECONDS = 1000.0
REQUESTS_OF_ONE_CLIENT = 4
SLOW_TOKENS_PER_S = 50.0
"""Prompts are computed more slowly than this by processors without instructions for the type (bf16 on many)."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much a round asks for."""

    rounds: int = 3
    clients: int = 4
    requests: int = 2
    """Prompts of each client, one after the other."""
    prompt_tokens: int = 256
    answer_tokens: int = 32
    document_tokens: int = 3 * BLOCK_TOKENS
    """Prefix that is in the store, a multiple of the block."""
    question_tokens: int = 16
    """What follows that prefix and is always computed."""
    client_counts: tuple[int, ...] = (1, 4, 8)
    decoded_tokens: int = 100
    others: int = 6
    """Requests of others while a client decodes."""


QUICK = Sizes(rounds=1, clients=4, requests=1, document_tokens=2 * BLOCK_TOKENS, decoded_tokens=64, others=4)


def shorter(sizes: Sizes) -> Sizes:
    """What a slow type gets, so that a run ends within half an hour."""
    return replace(
        sizes, requests=1, prompt_tokens=BLOCK_TOKENS, answer_tokens=16, document_tokens=BLOCK_TOKENS, decoded_tokens=48, others=4
    )


def asked_by(clients: int) -> int:
    """Requests in a round of ``Pair.ttft``: one each, and of a single client several, one after the other."""
    return REQUESTS_OF_ONE_CLIENT if clients == 1 else clients


@dataclass(slots=True)
class Samples:
    """What one arm has measured: a value a round in each list."""

    by_name: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    gathered: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Single observations of all rounds, for percentiles over all of them."""

    def add_percentiles(self, name: str, values: Sequence[float]) -> None:
        self.gathered[name] += values
        for percent in (50, 99):
            self.by_name[f"{name}_p{percent}"].append(percentile(values, percent))


@dataclass(frozen=True, slots=True)
class Burst:
    """Several clients at once."""

    tokens_per_s: float
    """Of prompts and answers, until the last answer."""
    timings: list[Timing]
    cores: float
    """Processors that the server used until then."""
    cpu_s_per_1000_tokens: float
    """With what was stored after the last answer."""


class Pair:
    """Both servers of one dtype. ``folder`` is the store's. One measurement at a time."""

    def __init__(self, store: VllmServer, bare: VllmServer, folder: Path, texts: Texts, sizes: Sizes, console: Console) -> None:
        self.store = store
        self.bare = bare
        self.folder = folder
        self.texts = texts
        self.sizes = sizes
        self.console = console
        self.idle: list[float] = []
        """Processors that the server used whose turn it was not."""

    def warm_up(self) -> None:
        """Kernels and thread pools are not part of any figure. Rounds become shorter where prompts are computed slowly."""
        for server in (self.store, self.bare):
            stream(server, self.texts.fresh("warm-up", BLOCK_TOKENS // 2), 4)
            self._settle(server)
        rate = BLOCK_TOKENS / stream(self.bare, self.texts.fresh("first", BLOCK_TOKENS), 1).ttft_s
        if rate < SLOW_TOKENS_PER_S:
            self.sizes = shorter(self.sizes)
            self._tell(self.bare, f"{rate:.0f} tokens/s of a prompt, so its rounds are shorter")

    def tokens_per_s(self) -> list[Item]:
        """Fresh prompts: nothing is found, everything is stored."""
        sizes = self.sizes
        samples = {id(self.store): Samples(), id(self.bare): Samples()}
        hits_before = self.store.hit_tokens()

        def arm(server: VllmServer) -> Callable[[int], float]:
            def run(number: int) -> float:
                prompts = [
                    [self.texts.fresh(f"tokens {number} {client} {turn}", sizes.prompt_tokens) for turn in range(sizes.requests)]
                    for client in range(sizes.clients)
                ]
                burst = self._timed(server, prompts, sizes.answer_tokens)
                kept = samples[id(server)]
                kept.by_name["cores"].append(burst.cores)
                kept.by_name["cpu_s"].append(burst.cpu_s_per_1000_tokens)
                kept.add_percentiles("ttft", [timing.ttft_s for timing in burst.timings])
                kept.add_percentiles("gap", [gap for timing in burst.timings for gap in timing.gaps_s])
                self._tell(server, f"fresh prompts, round {number + 1}: {burst.tokens_per_s:.1f} tokens/s")
                return burst.tokens_per_s

            return run

        with_store, without = abba(sizes.rounds, arm(self.store), arm(self.bare))
        void = f"{self.store.hit_tokens() - hits_before} tokens came from the store" if self.store.hit_tokens() != hits_before else None
        ours, bare = samples[id(self.store)].by_name, samples[id(self.bare)].by_name
        facts = {"clients": sizes.clients, "prompt_tokens": sizes.prompt_tokens, "answer_tokens": sizes.answer_tokens}
        names = (("cores", "processors"), ("cpu_s", "s/1000 tokens"), ("ttft_p50", "s"), ("ttft_p99", "s"), ("gap_p99", "s"))
        items = [comparison("0_hits.tokens_per_s", with_store, without, unit="tokens/s", bar=TOKENS_PER_S_BAR, facts=facts, void=void)]
        return items + [comparison(f"0_hits.{name}", ours[name], bare[name], unit=unit, void=void) for name, unit in names]

    def ttft(self) -> list[Item]:
        """Prompts whose beginning an earlier request has had: in the store and out of all memory, or computed again."""
        sizes = self.sizes
        self._fill(self.store)
        samples = {id(self.store): Samples(), id(self.bare): Samples()}
        hits: list[int] = []
        read_mb: list[float] = []

        def arm(server: VllmServer) -> Callable[[int], float]:
            def run(number: int) -> float:
                before, hits_before, started_s = usage_of(server.session), server.hit_tokens(), time.perf_counter()
                for count in sizes.client_counts:
                    self._cold(server)
                    questions = self._questions(f"ttft {number} {count}", asked_by(count))
                    prompts = [questions] if count == 1 else [[question] for question in questions]
                    values = [timing.ttft_s for timing in each_client(server, prompts, 4)]
                    samples[id(server)].add_percentiles(f"{count}", values)
                    self._tell(server, f"{count} clients, round {number + 1}: first token after {percentile(values, 50):.2f} s")
                if server is self.store:
                    hits.append(server.hit_tokens() - hits_before)
                    read_mb.append((usage_of(server.session) - before).read_bytes / 1e6)
                return time.perf_counter() - started_s

            return run

        abba(sizes.rounds, arm(self.store), arm(self.bare))
        wanted = sum(map(asked_by, sizes.client_counts)) * sizes.document_tokens
        void = None if all(found == wanted for found in hits) else f"tokens from the store in each round: {hits}, not {wanted}"
        ours, bare = samples[id(self.store)], samples[id(self.bare)]
        items = []
        for name in ours.by_name:
            count, _, percent = name.partition("_p")
            facts = {"samples": len(ours.gathered[count]), "prefix_tokens": sizes.document_tokens, "drive_read_MB_a_round": read_mb}
            title = f"ttft_p{percent}.{count}_client{'s' * (count != '1')}"
            items.append(comparison(title, ours.by_name[name], bare.by_name[name], unit="s", facts=facts, void=void))
        return items

    def gaps(self) -> list[Item]:
        """Time between the tokens of a client that decodes while others load what is stored, or store what they compute."""
        self._fill(self.store)
        self._fill(self.bare)  # what one loads from the drive the other has in memory: neither computes it
        items = []
        for kind in ("store", "load"):
            samples = {id(self.store): Samples(), id(self.bare): Samples()}
            hits: list[int] = []

            def arm(
                server: VllmServer, kind: str = kind, samples: dict[int, Samples] = samples, hits: list[int] = hits
            ) -> Callable[[int], float]:
                def run(number: int) -> float:
                    if kind == "load" and server is self.store:
                        self._cold(server)
                    hits_before = server.hit_tokens()
                    gaps = [gap * MILLISECONDS for gap in self._decode_beside(server, kind, number).gaps_s]
                    samples[id(server)].add_percentiles("gap", gaps)
                    if server is self.store:
                        hits.append(server.hit_tokens() - hits_before)
                    self._tell(server, f"others {kind}, round {number + 1}: p99 {percentile(gaps, 99):.0f} ms between tokens")
                    self._settle(server)
                    return max(gaps)

                return run

            abba(self.sizes.rounds, arm(self.store), arm(self.bare))
            items += self._gap_items(kind, samples, hits)
        return items

    def _gap_items(self, kind: str, samples: dict[int, Samples], hits: list[int]) -> list[Item]:
        wanted = self.sizes.others * self.sizes.document_tokens if kind == "load" else 0
        void = None if all(found == wanted for found in hits) else f"tokens from the store in each round: {hits}, not {wanted}"
        ours, bare = samples[id(self.store)], samples[id(self.bare)]
        facts = {
            "samples": len(ours.gathered["gap"]),
            "with_store_all_rounds_p99": percentile(ours.gathered["gap"], 99),
            "without_store_all_rounds_p99": percentile(bare.gathered["gap"], 99),
        }
        return [
            comparison(
                f"gap_p{percent}.while_others_{kind}",
                ours.by_name[f"gap_p{percent}"],
                bare.by_name[f"gap_p{percent}"],
                unit="ms",
                bar=GAP_BAR if percent == 99 else None,
                facts=facts if percent == 99 else None,
                void=void,
            )
            for percent in (50, 99)
        ]

    def _decode_beside(self, server: VllmServer, kind: str, number: int) -> Timing:
        """Others start at the same tokens of the decoding client in both arms, one after the other."""
        sizes = self.sizes
        step = sizes.decoded_tokens // (sizes.others + 1)
        if kind == "load":
            prompts = self._questions(f"gaps {number}", sizes.others)
        else:
            prompts = [self.texts.fresh(f"gaps {number} {other}", sizes.prompt_tokens) for other in range(sizes.others)]
        waiting = iter(prompts)
        asked: list[Future[Timing]] = []
        with ThreadPoolExecutor(1) as others:

            def on_token(count: int) -> None:
                if count % step == 0 and (prompt := next(waiting, None)) is not None:
                    asked.append(others.submit(stream, server, prompt, 1))

            decoding = stream(server, self.texts.fresh(f"decoding {kind} {number}", BLOCK_TOKENS // 2), sizes.decoded_tokens, on_token)
            for other in asked:
                other.result()
        return decoding

    def _document(self, number: int) -> list[int]:
        return self.texts.fresh(f"document {number}", self.sizes.document_tokens)

    def _questions(self, name: str, count: int) -> list[list[int]]:
        """One new question to each of the first ``count`` documents."""
        return [[*self._document(number), *self.texts.fresh(f"{name} {number}", self.sizes.question_tokens)] for number in range(count)]

    def _fill(self, server: VllmServer) -> None:
        for document in self._questions("fill", max(*self.sizes.client_counts, self.sizes.others)):
            stream(server, document, 1)
        self._tell(server, "the documents were computed")
        self._settle(server)

    def _timed(self, server: VllmServer, prompts: Sequence[Sequence[Sequence[int]]], answer_tokens: int) -> Burst:
        other = self.bare if server is self.store else self.store
        tokens = sum(len(prompt) + answer_tokens for own in prompts for prompt in own)
        before, other_before, started_s = usage_of(server.session), usage_of(other.session), time.perf_counter()
        timings = each_client(server, prompts, answer_tokens)
        wall_s = time.perf_counter() - started_s
        answered = usage_of(server.session) - before
        self.idle.append((usage_of(other.session) - other_before).cpu_s / wall_s)
        self._settle(server)
        settled = usage_of(server.session) - before
        return Burst(tokens / wall_s, timings, answered.cpu_s / wall_s, settled.cpu_s / tokens * 1000)

    def _cold(self, server: VllmServer) -> None:
        """Empty vLLM's own cache; with the store also drop what the kernel holds of its files."""
        self._settle(server)
        deadline_s = time.monotonic() + RESET_TIMEOUT_S
        waiting = threading.Event()
        while not server.post("/reset_prefix_cache", {})["success"]:
            if time.monotonic() > deadline_s:
                raise server.failure("its prefix cache cannot be reset")
            waiting.wait(0.1)
        if server is self.store:
            forget_pages(self.folder)

    def _settle(self, server: VllmServer) -> None:
        """What is still being stored must not cost the other arm's turn."""
        if not wait_idle(server.session):
            raise KvlodeError("a server does not come to rest", where=server.log)

    def _tell(self, server: VllmServer, text: str) -> None:
        self.console.print(f"{server.options.dtype}, {'with' if server is self.store else 'without'} the store: {text}", markup=False)
