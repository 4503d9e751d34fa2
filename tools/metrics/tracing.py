"""OpenTelemetry spans of what a host does with a store: wrap a store or a namespace, use it as before.

Needs ``opentelemetry-api`` (the extra ``tracing``). What is not wrapped costs nothing. A span is of the tracer ``kvlode``; its
attributes are ``kvlode.store``, ``kvlode.namespace`` (digest in hex), ``kvlode.blocks``, ``kvlode.bytes`` and what came of it. A span of
a job begins with the call and ends when the job is done, on the thread of the store that finishes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from opentelemetry import trace
from opentelemetry.trace import Span, Status, StatusCode, Tracer, TracerProvider

from ...engine.blocks import view_block
from ...engine.contract import Block, BlockSpace, PutState, PutStatus, Store
from ...engine.contract import Status as GetStatus
from ...format.namespace import Namespace

_BAD = {GetStatus.CORRUPT, GetStatus.IO_ERROR}


class TracedStore:
    """A store whose namespaces and flushes make spans; everything else is the store's own (``contract.Store``). Thread-safe as the store.

    ``provider``: where the spans go, the global tracer provider when not given.
    """

    def __init__(self, store: Store, provider: TracerProvider | None = None) -> None:
        self._store = store
        self._tracer = trace.get_tracer("kvlode", tracer_provider=provider)
        self._name = str(getattr(store, "path", ""))

    def namespace(self, descriptor: Namespace) -> TracedSpace:
        return TracedSpace(self._store.namespace(descriptor), self._tracer, self._name)

    def flush(self, timeout: float | None = None) -> bool:
        with self._tracer.start_as_current_span("kvlode.flush", attributes={"kvlode.store": self._name}) as span:
            done = self._store.flush(timeout)
            span.set_attribute("kvlode.durable", done)
            if not done:
                span.set_status(Status(StatusCode.ERROR, "not durable: too late, or blocks were dropped"))
            return done

    def __enter__(self) -> TracedStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self._store.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class TracedSpace:
    """A namespace whose puts, gets and jobs make spans; everything else is the namespace's own (``contract.BlockSpace``)."""

    def __init__(self, space: BlockSpace, tracer: Tracer, store: str) -> None:
        self._space = space
        self._tracer = tracer
        self._facts: Mapping[str, str] = {"kvlode.store": store, "kvlode.namespace": space.digest.hex()}

    def put(self, key: bytes, block: Block, **options: Any) -> PutStatus:
        with self._tracer.start_as_current_span("kvlode.put", attributes=self._about([block])) as span:
            status = self._space.put(key, block, **options)
            _tell_put(span, [status])
            return status

    def submit_put(self, keys: Sequence[bytes], blocks: Sequence[Block], *, queue: Any | None = None, **options: Any) -> Any:
        span = self._tracer.start_span("kvlode.submit_put", attributes=self._about(blocks))
        return self._job(span, _tell_put, queue, lambda inner: self._space.submit_put(keys, blocks, queue=inner, **options))

    def get_into(self, key: bytes, out: Block, *, timeout: float | None = None) -> GetStatus:
        return self.get_many_into([key], [out], timeout=timeout)[0]

    def get_many_into(self, keys: Sequence[bytes], outs: Sequence[Block], *, timeout: float | None = None) -> list[GetStatus]:
        with self._tracer.start_as_current_span("kvlode.get", attributes=self._about(outs)) as span:
            statuses = self._space.get_many_into(keys, outs, timeout=timeout)
            _tell_get(span, statuses)
            return statuses

    def submit_get(self, keys: Sequence[bytes], outs: Sequence[Block], *, queue: Any | None = None, **options: Any) -> Any:
        span = self._tracer.start_span("kvlode.submit_get", attributes=self._about(outs))
        return self._job(span, _tell_get, queue, lambda inner: self._space.submit_get(keys, outs, queue=inner, **options))

    def submit_get_range(
        self, keys: Sequence[bytes], outs: Sequence[Block], start_bytes: int, *, queue: Any | None = None, **options: Any
    ) -> Any:
        span = self._tracer.start_span("kvlode.submit_get_range", attributes=self._about(outs) | {"kvlode.start_bytes": start_bytes})
        return self._job(
            span, _tell_get, queue, lambda inner: self._space.submit_get_range(keys, outs, start_bytes, queue=inner, **options)
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._space, name)

    def _about(self, blocks: Iterable[Block]) -> dict[str, Any]:
        sizes = [view_block(block, writable=False, dtype=self._space.descriptor.dtype).nbytes for block in blocks]
        return {**self._facts, "kvlode.blocks": len(sizes), "kvlode.bytes": sum(sizes)}

    @staticmethod
    def _job(span: Span, tell: Any, queue: Any | None, submit: Any) -> Any:
        """Submit a job that ends the span. The store pushes the job into the queue that it was given: one of ours, which passes it on."""
        try:
            return submit(_Ending(span, tell, queue))
        except BaseException as error:
            span.record_exception(error)
            span.set_status(Status(StatusCode.ERROR, str(error)))
            span.end()
            raise


class _Ending:
    """Stands in for a completion queue: ends the span when the job is done, then tells the host's own queue."""

    def __init__(self, span: Span, tell: Any, queue: Any | None) -> None:
        self._span = span
        self._tell = tell
        self._queue = queue

    def push(self, job: Any) -> None:
        """Called by the store, on any thread, once: the job is done."""
        self._tell(self._span, job.statuses)
        self._span.end()
        if self._queue is not None:
            self._queue.push(job)


def _tell_put(span: Span, statuses: Sequence[PutStatus]) -> None:
    for state, count in Counter(status.state for status in statuses).items():
        span.set_attribute(f"kvlode.{state.name.lower()}", count)
    reasons = sorted({str(status.reason) for status in statuses if status.state is PutState.REFUSED})
    if reasons:
        span.set_status(Status(StatusCode.ERROR, f"refused: {', '.join(reasons)}"))


def _tell_get(span: Span, statuses: Sequence[GetStatus]) -> None:
    for status, count in Counter(statuses).items():
        span.set_attribute(f"kvlode.{status.name.lower()}", count)
    bad = sorted({status.name for status in statuses if status in _BAD})
    if bad:
        span.set_status(Status(StatusCode.ERROR, ", ".join(bad)))


def traced(store: Store, provider: TracerProvider | None = None) -> Store:
    """``store`` with spans, in the shape of a store."""
    return cast(Store, TracedStore(store, provider))
