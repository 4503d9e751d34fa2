"""Spans of OpenTelemetry: one a call or job, with what came of it; results are those of the store itself."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import kvlode
from kvlode import CompletionQueue, InvalidBlock, MemoryStore, Status, Store
from rig import KIB

pytest.importorskip("opentelemetry.sdk")

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from kvlode.tools.metrics.tracing import traced

BLOCK_BYTES = 16 * KIB
SPACE = kvlode.Namespace(model="m", revision="1", dtype="uint8", layout="x", tokens_per_block=16, block_bytes_max=BLOCK_BYTES)


class Spans:
    """A tracer provider that keeps what it gets."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.name == name]


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture(params=["disk", "memory"])
def store(request: pytest.FixtureRequest, spans: Spans, tmp_path: object) -> Iterator[Store]:
    inner: Store = (
        MemoryStore("16MiB") if request.param == "memory" else kvlode.open(f"{tmp_path}/store", capacity="64MiB", buffer="8MiB", gds="off")
    )
    with traced(inner, spans.provider) as store:
        yield store


def block(value: int) -> np.ndarray:
    return np.full(BLOCK_BYTES, value, np.uint8)


def test_puts_gets_and_flushes_are_spans_with_their_outcome(store: Store, spans: Spans) -> None:
    space = store.namespace(SPACE)
    assert space.put(b"a", block(1))
    assert space.put(b"a", block(1))
    assert store.flush(30)
    out = block(0)
    assert space.get_into(b"a", out) is Status.HIT and (out == 1).all()
    assert space.get_many_into([b"a", b"absent"], [block(0), block(0)]) == [Status.HIT, Status.MISS]
    first, second = spans.named("kvlode.put")
    assert first.attributes is not None and second.attributes is not None
    assert (first.attributes["kvlode.accepted"], second.attributes["kvlode.exists"]) == (1, 1)
    assert first.attributes["kvlode.bytes"] == BLOCK_BYTES and first.attributes["kvlode.namespace"] == space.digest.hex()
    (flush,) = spans.named("kvlode.flush")
    assert flush.attributes is not None and flush.attributes["kvlode.durable"] is True
    one, two = spans.named("kvlode.get")
    assert one.attributes is not None and two.attributes is not None
    assert one.attributes["kvlode.hit"] == 1
    assert (two.attributes["kvlode.blocks"], two.attributes["kvlode.hit"], two.attributes["kvlode.miss"]) == (2, 1, 1)


def test_a_job_is_one_span_that_ends_with_it_and_the_hosts_queue_hears_of_it(store: Store, spans: Spans) -> None:
    space = store.namespace(SPACE)
    queue = CompletionQueue()
    job = space.submit_put([b"a", b"b"], [block(1), block(2)], queue=queue)
    assert job.wait(30)
    assert queue.pop() is job
    outs = [block(0), block(0)]
    get = space.submit_get([b"a", b"b"], outs, queue=queue)
    assert get.wait(30) and list(get.statuses) == [Status.HIT, Status.HIT]
    part = np.zeros(100, np.uint8)
    ranged = space.submit_get_range([b"b"], [part], 8)
    assert ranged.wait(30) and (part == 2).all()
    store.close()  # after it nothing of a job is left to do
    (put_span,) = spans.named("kvlode.submit_put")
    (get_span,) = spans.named("kvlode.submit_get")
    (range_span,) = spans.named("kvlode.submit_get_range")
    assert put_span.attributes is not None and put_span.attributes["kvlode.blocks"] == 2
    assert get_span.attributes is not None and get_span.attributes["kvlode.hit"] == 2
    assert range_span.attributes is not None and range_span.attributes["kvlode.start_bytes"] == 8
    assert queue.pop() is get
    queue.close()


def test_a_call_that_raises_leaves_a_span_with_the_error(store: Store, spans: Spans) -> None:
    space = store.namespace(SPACE)
    with pytest.raises(InvalidBlock):
        space.put(b"a", np.zeros(2 * BLOCK_BYTES, np.uint8))
    with pytest.raises(InvalidBlock):
        space.submit_put([b"a"], [np.zeros(2 * BLOCK_BYTES, np.uint8)])
    for name in ("kvlode.put", "kvlode.submit_put"):
        (span,) = spans.named(name)
        assert not span.status.is_ok and span.events


def test_everything_else_is_the_stores_own(store: Store, spans: Spans) -> None:
    space = store.namespace(SPACE)
    assert space.put(b"a", block(1))
    assert space.contains([b"a", b"b"]) == [True, False] and space.match_prefix([b"a", b"b"]) == 1
    with space.pin([b"a"]) as held:
        assert held == 1
    assert space.delete([b"a"]) == 1
    assert store.stats()["counters"]["put_blocks"] == 1
    assert {span.name for span in spans.exporter.get_finished_spans()} == {"kvlode.put"}
