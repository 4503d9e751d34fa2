"""Views over what a host passes as a block: spans of bytes in host or GPU memory, checked once, never copied.

A block is a contiguous CPU or CUDA ``torch.Tensor``, any C-contiguous object of the buffer protocol, or a list of
those. ``view_block`` turns each into a ``BlockView``: one-dimensional spans of ``uint8`` in the order of the block's
bytes. torch is never imported here on behalf of a caller who passes none of its tensors.

The branches for CUDA are real code that the test machine, which has no GPU, never ran.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from ..format.errors import InvalidBlock, InvalidConfig
from ..format.namespace import ELEMENT_SIZES
from .contract import Block

Span = Any
"""One-dimensional ``uint8`` memory: a NumPy array (host), or a CUDA ``torch.Tensor`` (``nbytes`` works for both)."""

HostSpan = np.ndarray[tuple[int], np.dtype[np.uint8]]
"""A span in host memory."""

_KINDS = "a contiguous torch.Tensor, a C-contiguous object of the buffer protocol, or a list of those"
_FORMATS = {"e": "float16", "f": "float32", "d": "float64", "g": "longdouble"}


class BlockView:
    """The bytes of one block, as ``spans`` of ``nbytes`` bytes in all; ``is_device`` when they lie in GPU memory.

    The view keeps the host's memory alive but owns nothing: the bytes are the host's. Thread-safe in itself (it never
    changes); who may touch the bytes when is the contract's business.
    """

    __slots__ = ("spans", "nbytes", "is_device")

    def __init__(self, spans: Sequence[Span], nbytes: int, is_device: bool) -> None:
        self.spans: tuple[Span, ...] = tuple(spans)
        self.nbytes = nbytes
        self.is_device = is_device

    @classmethod
    def of_host(cls, *spans: HostSpan) -> BlockView:
        """A view of ``uint8`` arrays that the store itself owns; nothing is checked."""
        return cls(spans, sum(span.nbytes for span in spans), False)

    def slice(self, start: int, stop: int) -> list[Span]:
        """The parts of the spans that cover the raw byte range ``[start, stop)``, in order."""
        if len(self.spans) == 1:
            return [self.spans[0][start:stop]] if start < min(stop, self.nbytes) else []
        return cut_spans(self.spans, start, stop)

    def direct_span(self, alignment: int) -> Span | None:
        """The one span of a block whose address and length are multiples of ``alignment``; ``None`` for any other block."""
        if len(self.spans) != 1 or self.nbytes % alignment:
            return None
        span = self.spans[0]
        address = span.data_ptr() if self.is_device else span.ctypes.data
        return span if address % alignment == 0 else None

    def copy_to_host(self, targets: Sequence[HostSpan], stream: Any = None) -> None:
        """Gather the block into ``targets`` (as many bytes in all, cut as they like); returns when every byte is there.

        From GPU memory the copies are ordered on ``stream`` (see ``copy_from_host``). The GIL is free while bytes move.
        """
        if self.is_device:
            _copy_on_stream(self.spans, self.spans, targets, stream, to_device=False)
        else:
            copy_spans(self.spans, targets)

    def copy_from_host(self, sources: Sequence[HostSpan], stream: Any = None) -> None:
        """Scatter ``sources`` (as many bytes in all, cut as they like) into the block; returns when they may be reused.

        Into GPU memory the copies are queued on ``stream``: behind what it holds, before what it is given later. ``None``
        is the current stream of the block's GPU in the calling thread; a ``torch.cuda.Stream`` or the integer of a raw
        CUDA stream also do.
        """
        if self.is_device:
            _copy_on_stream(self.spans, sources, self.spans, stream, to_device=True)
        else:
            copy_spans(sources, self.spans)


def view_block(block: Block, *, writable: bool, dtype: str, bytes_max: int | None = None) -> BlockView:
    """The view of a host's block; ``writable`` when it is the destination of a read, ``dtype`` is the namespace's.

    Integers and bytes are opaque and always fit; floating-point elements must be of ``dtype``, since blocks of another
    element type under the same namespace are other bytes. ``bytes_max`` bounds the length of a block to put. A tensor that
    requires gradients is taken without its history. Raises ``InvalidBlock``.
    """
    if isinstance(block, list):
        view = _view_list(block, writable, dtype)
    else:
        span, is_device = _view_one(block, writable, dtype, None)
        view = BlockView((span,), span.nbytes, is_device)
    if bytes_max is not None and view.nbytes > bytes_max:
        raise InvalidBlock(
            "a block is longer than its namespace allows",
            expected=f"at most {bytes_max} bytes (block_bytes_max)",
            actual=f"{view.nbytes} bytes",
            action="Open a namespace with a larger block_bytes_max, or put fewer tokens a block.",
        )
    return view


def check_start(start_bytes: int) -> None:
    """Raise ``InvalidConfig`` unless this can be the place where a part of a block begins."""
    if start_bytes < 0:
        raise InvalidConfig("a part begins before its block", expected="start_bytes of 0 or more", actual=start_bytes)


def cut_spans(spans: Sequence[Span], start: int, stop: int) -> list[Span]:
    """The parts of ``spans``, seen as one run of bytes, that cover ``[start, stop)``."""
    parts: list[Span] = []
    position = 0
    for span in spans:
        if position >= stop:
            break
        first, last = max(start - position, 0), min(stop - position, span.nbytes)
        if first < last:
            parts.append(span[first:last])
        position += span.nbytes
    return parts


def neighbours(sizes_bytes: Sequence[int], bytes_max: int, count_max: int | None = None) -> Iterator[range]:
    """Positions cut into runs of up to ``bytes_max`` and ``count_max``: one large block, or several small ones."""
    start, run_bytes = 0, 0
    for position, size_bytes in enumerate(sizes_bytes):
        if position > start and (run_bytes + size_bytes > bytes_max or position - start == count_max):
            yield range(start, position)
            start, run_bytes = position, 0
        run_bytes += size_bytes
    if sizes_bytes:
        yield range(start, len(sizes_bytes))


def copy_spans(sources: Sequence[HostSpan], targets: Sequence[HostSpan]) -> None:
    """Copy one run of bytes into another that is cut differently; both lie in host memory and are equally long.

    Raises ``ValueError`` when the lengths differ. The GIL is free while large spans are copied.
    """
    for source, target in pairs_of(sources, targets):
        np.copyto(target, source)


def pairs_of(sources: Sequence[Span], targets: Sequence[Span]) -> Iterator[tuple[Span, Span]]:
    """Equally long pieces of two runs of bytes, in order; raises ``ValueError`` before the first when the lengths differ."""
    source_bytes, target_bytes = sum(span.nbytes for span in sources), sum(span.nbytes for span in targets)
    if source_bytes != target_bytes:
        raise ValueError(f"{source_bytes} bytes cannot be copied into {target_bytes} bytes")
    remaining = iter(targets)
    target, filled = None, 0
    for source in sources:
        taken = 0
        while taken < source.nbytes:
            if target is None or filled == target.nbytes:
                target, filled = next(remaining), 0
                continue
            length = min(source.nbytes - taken, target.nbytes - filled)
            yield source[taken : taken + length], target[filled : filled + length]
            taken += length
            filled += length


# --- one block ---------------------------------------------------------------------------------------------------


def _view_list(blocks: list[Any], writable: bool, dtype: str) -> BlockView:
    if not blocks:
        raise InvalidBlock("a block is an empty list", expected=_KINDS, actual="no parts", action="Pass at least one part.")
    spans: list[Span] = []
    places: list[str] = []
    for position, part in enumerate(blocks):
        span, is_device = _view_one(part, writable, dtype, position)
        spans.append(span)
        places.append(str(span.device) if is_device else "host memory")
        if places[position] != places[0]:
            raise InvalidBlock(
                "the parts of a block lie in different memories",
                where=_where(position),
                expected=f"{places[0]}, like part 0",
                actual=places[position],
                action="Move the parts into one place, or store them as blocks of their own.",
            )
    return BlockView(spans, sum(span.nbytes for span in spans), places[0] != "host memory")


def _view_one(block: Any, writable: bool, dtype: str, position: int | None) -> tuple[Span, bool]:
    """The span of one part of a block, and whether it is GPU memory."""
    if isinstance(block, np.ndarray):
        return _view_array(block, writable, dtype, position), False
    tensor_type = getattr(sys.modules.get("torch"), "Tensor", None)
    if tensor_type is not None and isinstance(block, tensor_type):
        return _view_tensor(block, dtype, position)
    return _view_buffer(block, writable, dtype, position), False


def _view_array(array: np.ndarray[Any, Any], writable: bool, dtype: str, position: int | None) -> HostSpan:
    if not array.flags.c_contiguous:
        _refuse_layout(f"an array of shape {array.shape} and strides {array.strides}", "numpy.ascontiguousarray", position)
    _check_bytes(array.nbytes, position)
    if writable and not array.flags.writeable:
        _refuse_read_only("a read-only numpy.ndarray", position)
    if array.dtype.kind not in "iub":
        _check_array_elements(array.dtype, dtype, position)
        if array.dtype.kind != "f":  # elements that the buffer protocol has no letter for
            array = np.asarray(array).reshape(-1).view(np.uint8)
    return np.frombuffer(array, dtype=np.uint8)


def _check_array_elements(found: np.dtype[Any], dtype: str, position: int | None) -> None:
    if found.hasobject:
        _refuse_type("a numpy array of Python objects", position)
    name = _FORMATS.get(found.char) or found.name
    if found.kind in "fc" or name in ELEMENT_SIZES:  # bfloat16 and float8 of other packages are of kind V
        _check_float(name, dtype, position)


def _view_tensor(tensor: Any, dtype: str, position: int | None) -> tuple[Span, bool]:
    torch = sys.modules["torch"]
    if tensor.layout is not torch.strided or tensor.is_quantized:
        _refuse_type(f"a tensor of layout {tensor.layout} and dtype {tensor.dtype}", position)
    kind = tensor.device.type
    if kind not in ("cpu", "cuda"):
        _refuse_type(f"a tensor on device {tensor.device}", position)
    if not tensor.is_contiguous():
        _refuse_layout(f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()}", ".contiguous()", position)
    _check_bytes(tensor.nbytes, position)
    found = tensor.dtype
    if found.is_floating_point or found.is_complex:
        _check_float(str(found).removeprefix("torch."), dtype, position)
    try:
        span = tensor.detach().reshape(-1).view(torch.uint8)
        return (span, True) if kind == "cuda" else (span.numpy(), False)
    except (RuntimeError, TypeError) as error:  # lazily negated or conjugated, fake, functional: no plain bytes to point at
        raise InvalidBlock(
            "a tensor has no plain memory",
            where=_where(position),
            expected=_KINDS,
            actual=str(error).splitlines()[0] if str(error) else type(error).__name__,
            action="Pass tensor.clone().",
        ) from error


def _view_buffer(block: Any, writable: bool, dtype: str, position: int | None) -> HostSpan:
    try:
        buffer = memoryview(block)
    except TypeError:
        _refuse_type(type(block).__name__, position)
    except (BufferError, ValueError) as error:
        _refuse_type(f"{type(block).__name__} ({error})", position)
    if not buffer.c_contiguous:
        _refuse_layout(f"a buffer of shape {buffer.shape} and strides {buffer.strides}", "bytes", position)
    _check_bytes(buffer.nbytes, position)
    if writable and buffer.readonly:
        _refuse_read_only(f"a read-only {type(block).__name__}", position)
    letter = buffer.format.lstrip("@=<>!^")
    if letter == "O":
        _refuse_type("a buffer of Python objects", position)
    if letter in _FORMATS:
        _check_float(_FORMATS[letter], dtype, position)
    return np.frombuffer(buffer, dtype=np.uint8)


# --- refusals ----------------------------------------------------------------------------------------------------


def _where(position: int | None) -> str | None:
    return None if position is None else f"part {position} of the list"


def _check_bytes(nbytes: int, position: int | None) -> None:
    if nbytes == 0:
        raise InvalidBlock("a block is empty", where=_where(position), expected="at least 1 byte", actual="0 bytes")


def _check_float(found: str, dtype: str, position: int | None) -> None:
    if found != dtype:
        raise InvalidBlock(
            "a block's elements are not those of its namespace",
            where=_where(position),
            expected=f"{dtype}, or opaque bytes (any integer type)",
            actual=found,
            action="Open a namespace with this dtype, or pass a view of integers if the bytes are meant as they are.",
        )


def _refuse_type(actual: str, position: int | None) -> NoReturn:
    raise InvalidBlock("a block is of a kind that cannot be stored", where=_where(position), expected=_KINDS, actual=actual)


def _refuse_layout(actual: str, remedy: str, position: int | None) -> NoReturn:
    raise InvalidBlock(
        "a block is not contiguous",
        where=_where(position),
        expected="memory without gaps, in C order",
        actual=actual,
        action=f"Copy it with {remedy}, or pass a list of its contiguous parts.",
    )


def _refuse_read_only(actual: str, position: int | None) -> NoReturn:
    raise InvalidBlock(
        "a destination cannot be written",
        where=_where(position),
        expected="writable memory",
        actual=actual,
        action="Pass a bytearray, an array or a tensor of your own.",
    )


# --- GPU memory (never run without a GPU) --------------------------------------------------------------------------


def _copy_on_stream(
    device_spans: Sequence[Span], sources: Sequence[Span], targets: Sequence[Span], stream: Any, *, to_device: bool
) -> None:
    """Queue copies between host and GPU memory on ``stream`` and wait for them alone, not for what is queued behind."""
    import torch

    device = device_spans[0].device
    with torch.cuda.device(device):
        queue = _as_stream(torch, stream, device)
        with torch.cuda.stream(queue):
            for source, target in pairs_of(sources, targets):
                if to_device:
                    target.copy_(_host_tensor(torch, source), non_blocking=True)
                else:
                    _host_tensor(torch, target).copy_(source, non_blocking=True)
            copied = queue.record_event()
        copied.synchronize()


def _host_tensor(torch: Any, span: HostSpan) -> Any:
    """A tensor over host memory; torch wants the right to write even where it only reads."""
    return torch.frombuffer(span if span.flags.writeable else np.array(span), dtype=torch.uint8)


def _as_stream(torch: Any, stream: Any, device: Any) -> Any:
    """A ``torch.cuda.Stream`` for what a host calls a stream."""
    if stream is None:
        return torch.cuda.current_stream(device)
    if isinstance(stream, int):
        return torch.cuda.ExternalStream(stream, device=device) if stream else torch.cuda.default_stream(device)
    return stream
