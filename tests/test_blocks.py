"""What a host may pass as a block, what is refused and how, and that bytes arrive whatever way they are cut."""

from __future__ import annotations

import array
import ctypes
import itertools
import mmap
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvlode import InvalidBlock
from kvlode.engine.blocks import BlockView, copy_spans, cut_spans, view_block

DTYPE = "bfloat16"


def view(block, *, writable=False, dtype=DTYPE, bytes_max=None):
    return view_block(block, writable=writable, dtype=dtype, bytes_max=bytes_max)


def bytes_of(block_view: BlockView) -> bytes:
    return b"".join(span.tobytes() for span in block_view.spans)


def ramp(size: int) -> np.ndarray:
    return (np.arange(size) % 251).astype(np.uint8)


# --- kinds of blocks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda raw: raw,
        lambda raw: raw.tobytes(),
        lambda raw: bytearray(raw.tobytes()),
        lambda raw: memoryview(raw),
        lambda raw: array.array("H", raw.tobytes()),
        lambda raw: (ctypes.c_char * raw.size).from_buffer_copy(raw.tobytes()),
        lambda raw: raw.view(np.int64).reshape(2, 2, -1),
        lambda raw: raw.view("M8[s]"),
        lambda raw: raw.view(np.dtype([("a", "u1"), ("b", "u1")])),
        lambda raw: raw.view(np.recarray),
        lambda raw: memoryview(raw).cast("B", (4, raw.size // 4)),
        lambda raw: torch.from_numpy(raw),
        lambda raw: torch.from_numpy(raw).view(torch.bfloat16),
        lambda raw: torch.from_numpy(raw).view(torch.uint16).reshape(2, 1, -1),
        lambda raw: torch.from_numpy(raw).view(torch.bool),
        lambda raw: [raw[:16], torch.from_numpy(raw[16:48]).view(torch.bfloat16), raw[48:].tobytes()],
    ],
)
def test_every_kind_of_block_is_seen_as_the_same_bytes(wrap):
    raw = ramp(64)
    seen = view(wrap(raw))
    assert bytes_of(seen) == raw.tobytes()
    assert seen.nbytes == 64 and not seen.is_device
    assert all(span.dtype == np.uint8 and span.ndim == 1 for span in seen.spans)


def test_views_share_the_hosts_memory_and_keep_it_alive():
    raw = ramp(4096)
    for block in (raw, memoryview(raw), torch.from_numpy(raw).view(torch.bfloat16)):
        assert view(block).spans[0].ctypes.data == raw.ctypes.data
    seen = view(bytearray(b"abcd"))
    assert bytes_of(seen) == b"abcd"


def test_a_mapped_file_is_a_block():
    with mmap.mmap(-1, 8192) as mapping:
        seen = view(mapping, writable=True)
        seen.spans[0][:3] = (1, 2, 3)
        assert mapping[:3] == b"\1\2\3"
        del seen


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 5), (1, 1, 1)])
def test_scalars_and_any_number_of_dimensions_are_flattened(shape):
    count = int(np.prod(shape, dtype=int))
    assert view(torch.zeros(shape, dtype=torch.bfloat16)).nbytes == 2 * count
    assert view(np.zeros(shape, dtype=np.float32), dtype="float32").nbytes == 4 * count


def test_gradients_and_inference_mode_are_no_obstacle():
    weights = torch.ones(8, dtype=torch.bfloat16, requires_grad=True)
    assert view(weights).nbytes == 16
    assert view(torch.nn.Parameter(weights.detach())).nbytes == 16
    with torch.inference_mode():
        inferred = torch.ones(8, dtype=torch.bfloat16)
    assert view(inferred, writable=True).nbytes == 16


def test_a_block_may_be_put_from_read_only_memory():
    frozen = ramp(16)
    frozen.flags.writeable = False
    assert bytes_of(view(frozen)) == ramp(16).tobytes()


def test_element_types_of_numpy_and_torch_are_compared_with_the_namespace():
    assert view(np.zeros(4, np.float16), dtype="float16").nbytes == 8
    assert view(torch.zeros(4, dtype=torch.float8_e4m3fn), dtype="float8_e4m3fn").nbytes == 4
    assert view(memoryview(array.array("f", [1.0])), dtype="float32").nbytes == 4
    assert view(torch.zeros(4, dtype=torch.int8), dtype="float32").nbytes == 4


def test_numpy_arrays_of_ml_dtypes_count_as_floating_point():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    block = np.zeros(4, ml_dtypes.bfloat16)
    assert view(block).nbytes == 8
    with pytest.raises(InvalidBlock, match="bfloat16"):
        view(block, dtype="float16")


# --- refusals ----------------------------------------------------------------------------------------------------


class _Sparse:
    """Names a tensor that has no plain memory, made only when its test runs."""

    coo = staticmethod(lambda: torch.eye(4).to_sparse())
    quantised = staticmethod(lambda: torch._empty_affine_quantized([4], scale=0.1, zero_point=0, dtype=torch.quint8))
    meta = staticmethod(lambda: torch.zeros(4, device="meta", dtype=torch.bfloat16))
    negated = staticmethod(lambda: torch._neg_view(torch.ones(4, dtype=torch.bfloat16)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.zeros(4, 4, dtype=torch.bfloat16).t(), ["not contiguous", "strides (1, 4)", "contiguous()"]),
        (lambda: torch.zeros(4, dtype=torch.bfloat16).expand(3, 4), ["not contiguous"]),
        (lambda: np.zeros((4, 4), np.uint8)[:, :2], ["not contiguous", "strides (4, 1)", "ascontiguousarray"]),
        (lambda: memoryview(bytes(16))[::2], ["not contiguous"]),
        (lambda: torch.zeros(4, dtype=torch.float32), ["elements", "bfloat16", "float32", "view of integers"]),
        (lambda: np.zeros(4, np.float64), ["bfloat16", "float64"]),
        (lambda: array.array("d", [1.0]), ["bfloat16", "float64"]),
        (lambda: torch.zeros(4, dtype=torch.complex64), ["complex64"]),
        (lambda: np.zeros(4, np.complex64), ["complex64"]),
        (lambda: [], ["empty list", "at least one part"]),
        (lambda: b"", ["empty", "at least 1 byte"]),
        (lambda: torch.zeros(0, dtype=torch.bfloat16), ["empty"]),
        (lambda: np.zeros((4, 0), np.uint8), ["empty"]),
        (lambda: [b"abc", b""], ["empty", "part 1 of the list"]),
        (lambda: np.array([object()]), ["cannot be stored", "Python objects"]),
        (lambda: "text", ["cannot be stored", "str"]),
        (lambda: None, ["cannot be stored", "NoneType"]),
        (lambda: [1, 2], ["cannot be stored", "int", "part 0"]),
        (lambda: [[b"nested"]], ["cannot be stored", "list", "part 0"]),
        (_Sparse.coo, ["cannot be stored", "sparse"]),
        (_Sparse.quantised, ["cannot be stored", "quint8"]),
        (_Sparse.meta, ["cannot be stored", "meta"]),
        (_Sparse.negated, ["no plain memory", "clone()"]),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize")
def test_what_cannot_be_stored_is_refused_with_what_and_why(make, words):
    with pytest.raises(InvalidBlock) as refusal:
        view(make())
    missing = [word for word in words if word not in str(refusal.value)]
    assert not missing, str(refusal.value)


@pytest.mark.parametrize("make", [lambda: b"read only", lambda: memoryview(b"read only"), lambda: [bytearray(4), b"read only"]])
def test_read_only_memory_is_no_destination(make):
    with pytest.raises(InvalidBlock, match="cannot be written"):
        view(make(), writable=True)


def test_a_read_only_array_is_no_destination():
    frozen = ramp(16)
    frozen.flags.writeable = False
    for block in (frozen, frozen.view("M8[s]"), memoryview(frozen)):
        with pytest.raises(InvalidBlock, match="read-only"):
            view(block, writable=True)


def test_the_longest_block_is_taken_and_one_byte_more_is_not():
    assert view(bytes(100), bytes_max=100).nbytes == 100
    with pytest.raises(InvalidBlock, match=r"at most 100 bytes.*101 bytes"):
        view([bytes(100), b"!"], bytes_max=100)


def test_torch_stays_out_of_processes_that_do_not_use_it():
    program = """
import sys
import numpy as np
from kvlode.engine.blocks import view_block
for block in (np.zeros(4, np.float32), b'abcd', bytearray(4), [b'a', np.zeros(3, np.uint8)]):
    view_block(block, writable=False, dtype='float32')
try:
    view_block('text', writable=False, dtype='float32')
except ValueError:
    print('torch' in sys.modules)
"""
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "False"


# --- cutting and copying -----------------------------------------------------------------------------------------


def cut(raw: np.ndarray, cuts: list[int]) -> list[np.ndarray]:
    edges = [0, *sorted(min(place, raw.size) for place in cuts), raw.size]
    return [raw[a:b] for a, b in itertools.pairwise(edges) if a < b]


CUTS = st.lists(st.integers(0, 300), max_size=8)


@given(st.integers(1, 300), CUTS, CUTS)
def test_bytes_arrive_however_the_two_sides_are_cut(size, source_cuts, target_cuts):
    raw, out = ramp(size), np.zeros(size, np.uint8)
    copy_spans(cut(raw, source_cuts), cut(out, target_cuts))
    assert np.array_equal(raw, out)


@given(st.integers(1, 300), CUTS, st.integers(0, 310), st.integers(0, 310))
def test_a_slice_covers_exactly_its_byte_range(size, cuts, start, stop):
    raw = ramp(size)
    spans = cut(raw, cuts)
    expected = raw[start:stop].tobytes() if start < stop else b""
    assert b"".join(part.tobytes() for part in cut_spans(spans, start, stop)) == expected
    block = BlockView.of_host(*spans)
    assert b"".join(part.tobytes() for part in block.slice(start, stop)) == expected
    assert all(np.shares_memory(part, raw) for part in block.slice(start, stop))


@given(st.integers(1, 300), CUTS, CUTS)
def test_gather_and_scatter_are_inverse(size, block_cuts, host_cuts):
    raw = ramp(size)
    block = view(cut(raw.copy(), block_cuts), writable=True)
    gathered = np.zeros(size, np.uint8)
    block.copy_to_host(cut(gathered, host_cuts))
    assert np.array_equal(gathered, raw)
    block.copy_from_host(cut(raw[::-1].copy(), host_cuts))
    assert bytes_of(block) == raw[::-1].tobytes()


def test_scattering_into_tensors_fills_the_tensors():
    values = torch.arange(24, dtype=torch.float32).to(torch.bfloat16)
    parts = [torch.zeros(5, dtype=torch.bfloat16), torch.zeros(2, 4, dtype=torch.bfloat16), torch.zeros(11, dtype=torch.bfloat16)]
    view(parts, writable=True).copy_from_host([view(values).spans[0]])
    assert torch.equal(torch.cat([part.flatten() for part in parts]), values)


def test_runs_of_different_lengths_are_not_copied_at_all():
    out = np.zeros(4, np.uint8)
    with pytest.raises(ValueError, match="3 bytes cannot be copied into 4 bytes"):
        copy_spans([ramp(3) + 1], [out])
    assert not out.any()


def test_a_direct_span_is_one_span_with_aligned_address_and_length():
    memory = np.frombuffer(mmap.mmap(-1, 3 * 4096), np.uint8)
    whole = view(memory).direct_span(4096)
    assert whole is not None and whole.ctypes.data == memory.ctypes.data and whole.size == memory.size
    assert view(torch.frombuffer(memory, dtype=torch.bfloat16)).direct_span(4096) is not None
    assert view(memory[8:]).direct_span(4096) is None
    assert view(memory[: 4096 + 8]).direct_span(4096) is None
    assert view([memory[:4096], memory[4096:]]).direct_span(4096) is None
    assert view(memory[8:24]).direct_span(8) is not None


def test_other_threads_run_while_large_spans_are_copied():
    """With a switch interval of a minute, a thread that was asleep only gets its turn when the copy gives up the GIL."""
    source, target = np.ones(32 << 20, np.uint8), np.empty(32 << 20, np.uint8)
    stop = threading.Event()
    turns = 0

    def count() -> None:
        nonlocal turns
        while not stop.wait(0.0001):
            turns += 1

    interval = sys.getswitchinterval()
    counter = threading.Thread(target=count)
    counter.start()
    try:
        sys.setswitchinterval(60)
        before = turns
        copies = 0
        while turns == before and copies < 200:
            copy_spans([source], [target])
            copies += 1
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        counter.join()
    assert turns > before


# --- GPU memory --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_device_blocks_are_copied_on_the_stream_they_are_given():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    values = torch.arange(1 << 20, dtype=torch.float32, device="cuda").to(torch.bfloat16)
    block = view([values[: 1 << 18], values[1 << 18 :]])
    assert block.is_device and block.nbytes == 2 << 20
    for stream in (None, torch.cuda.Stream(), torch.cuda.Stream().cuda_stream, 0):
        if isinstance(stream, torch.cuda.Stream):
            stream.wait_stream(torch.cuda.current_stream())
        host = np.zeros(2 << 20, np.uint8)
        block.copy_to_host([host[:100], host[100:]], stream)
        assert host.tobytes() == values.cpu().view(torch.uint8).numpy().tobytes()
        back = torch.zeros_like(values)
        torch.cuda.current_stream().synchronize()
        view(back, writable=True).copy_from_host([host], stream)
        assert torch.equal(back, values)


@pytest.mark.gpu
def test_parts_in_different_memories_are_refused():
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    with pytest.raises(InvalidBlock, match="different memories"):
        view([torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16, device="cuda")])
