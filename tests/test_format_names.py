"""Limits, file names, sequence numbers, keys, tags and namespace descriptors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlode.format.errors import CorruptRecord, FormatError, InvalidBlock, InvalidConfig, InvalidKey, UnsupportedFormat
from kvlode.format.keys import check_key, check_meta, key_digest, prefix_keys, tag_digest
from kvlode.format.layout import (
    BLOCK_BYTES_MAX,
    PAGE_BYTES,
    STRIPE_BYTES_DEFAULT,
    STRIPES_MAX,
    ZERO_DIGEST,
    page_count,
    parse_segment_name,
    round_up_pages,
    segment_name,
    sequence,
    stripe_bytes_for,
)
from kvlode.format.namespace import ELEMENT_SIZES, Namespace

BASE: dict[str, Any] = {
    "model": "m",
    "revision": "r",
    "dtype": "bfloat16",
    "layout": "l",
    "tokens_per_block": 16,
    "block_bytes_max": 1 << 20,
}

# --- layout ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**64 - 1))
def test_segment_names_are_read_back(segment_id: int) -> None:
    name = segment_name(segment_id)
    assert len(name) == 20 and parse_segment_name(name) == segment_id


@given(st.text())
def test_other_names_are_not_segments(name: str) -> None:
    segment_id = parse_segment_name(name)
    assert segment_id is None or segment_name(segment_id) == name


@pytest.mark.parametrize("name", ["0.seg", "00000000000000AB.seg", "00000000000000ab.seg.new", "spare.new", "00000000000000ab.seg\n"])
def test_names_that_look_like_segments_are_not(name: str) -> None:
    assert parse_segment_name(name) is None


def test_segment_ids_outside_64_bits_have_no_name() -> None:
    for segment_id in (-1, 2**64):
        with pytest.raises(InvalidConfig):
            segment_name(segment_id)


@given(st.integers(0, BLOCK_BYTES_MAX), st.integers(1, BLOCK_BYTES_MAX))
def test_stripes_are_whole_pages_few_enough_and_multiples_of_what_was_asked(raw_length: int, wanted: int) -> None:
    size = stripe_bytes_for(raw_length, wanted)
    assert size % PAGE_BYTES == 0 and size % round_up_pages(wanted) == 0
    assert raw_length <= size * STRIPES_MAX
    smaller = size - round_up_pages(wanted)
    assert smaller == 0 or raw_length > smaller * STRIPES_MAX


def test_the_default_stripe_is_kept_up_to_its_128th_and_grows_after() -> None:
    assert stripe_bytes_for(STRIPE_BYTES_DEFAULT * STRIPES_MAX) == STRIPE_BYTES_DEFAULT
    assert stripe_bytes_for(STRIPE_BYTES_DEFAULT * STRIPES_MAX + 1) == 2 * STRIPE_BYTES_DEFAULT


@pytest.mark.parametrize(("raw_length", "wanted"), [(-1, 4096), (BLOCK_BYTES_MAX + 1, 4096), (1, 0), (1, BLOCK_BYTES_MAX + 1)])
def test_impossible_blocks_and_stripes_are_refused(raw_length: int, wanted: int) -> None:
    with pytest.raises(InvalidBlock):
        stripe_bytes_for(raw_length, wanted)


def test_pages() -> None:
    assert [page_count(size) for size in (0, 1, 4096, 4097)] == [0, 1, 1, 2]
    assert [round_up_pages(size) for size in (0, 1, 4096, 4097)] == [0, 4096, 4096, 8192]


@given(st.tuples(st.integers(0, 2**24 - 1), st.integers(0, 2**40 - 1)), st.tuples(st.integers(0, 2**24 - 1), st.integers(0, 2**40 - 1)))
def test_sequence_numbers_sort_by_epoch_and_then_by_counter(left: tuple[int, int], right: tuple[int, int]) -> None:
    assert (sequence(*left) < sequence(*right)) == (left < right)


@pytest.mark.parametrize(("epoch", "counter"), [(2**24, 0), (1, 2**40), (-1, 0), (0, -1)])
def test_sequence_numbers_end_with_an_error(epoch: int, counter: int) -> None:
    with pytest.raises(InvalidConfig):
        sequence(epoch, counter)


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [b"", bytes(256), "text", bytearray(b"a"), None])
def test_impossible_keys_are_refused(key: Any) -> None:
    with pytest.raises(InvalidKey):
        check_key(key)


def test_keys_and_metadata_up_to_their_limits_are_accepted() -> None:
    check_key(b"\0")
    check_key(bytes(255))
    check_meta(b"")
    check_meta(bytes(512))


@pytest.mark.parametrize("meta", [bytes(513), "text", None])
def test_impossible_metadata_is_refused(meta: Any) -> None:
    with pytest.raises(InvalidKey):
        check_meta(meta)


def test_digests_of_keys_and_tags_are_apart() -> None:
    assert tag_digest(None) == ZERO_DIGEST
    assert tag_digest("a") == tag_digest(b"a") != key_digest(b"a")
    assert len(key_digest(b"a")) == len(tag_digest("")) == 16
    with pytest.raises(InvalidKey):
        tag_digest(3)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 2**63 - 1), max_size=60), st.integers(1, 7), st.binary(max_size=5))
def test_prefix_keys_follow_their_definition(tokens: list[int], block_tokens: int, salt: bytes) -> None:
    expected, parent = [], hashlib.blake2b(salt, digest_size=32, person=b"kvlode-prefix").digest()
    for index in range(len(tokens) // block_tokens):
        block = tokens[index * block_tokens : (index + 1) * block_tokens]
        data = parent + b"".join(token.to_bytes(8, "little") for token in block)
        parent = hashlib.blake2b(data, digest_size=32, person=b"kvlode-prefix").digest()
        expected.append(parent)
    assert prefix_keys(tokens, block_tokens, salt) == expected
    assert prefix_keys(np.array(tokens, dtype=np.uint64), block_tokens, salt) == expected
    assert prefix_keys(tuple(tokens), block_tokens, salt) == expected


@given(st.lists(st.integers(0, 99), max_size=40), st.lists(st.integers(0, 99), max_size=40), st.integers(1, 5))
def test_keys_are_equal_exactly_as_far_as_the_prefixes_are(left: list[int], right: list[int], block_tokens: int) -> None:
    equal = [a == b for a, b in zip(prefix_keys(left, block_tokens), prefix_keys(right, block_tokens), strict=False)]
    for index, same in enumerate(equal):
        end = (index + 1) * block_tokens
        assert same == (left[:end] == right[:end])


def test_integer_types_do_not_change_the_keys() -> None:
    expected = prefix_keys([1, 2, 3, 4], 2)
    for dtype in ("u1", "<i2", ">i4", "<u4", "<i8"):
        assert prefix_keys(np.array([1, 2, 3, 4], dtype=dtype), 2) == expected
    assert prefix_keys(np.array([1, 9, 2, 9, 3, 9, 4, 9])[::2], 2) == expected


@pytest.mark.parametrize("tokens", [[1.5], [-1], [[1]], ["a"], [2**64], 5, [None], np.array([1.0])])
def test_tokens_that_are_no_integers_are_refused(tokens: Any) -> None:
    with pytest.raises(InvalidKey):
        prefix_keys(tokens, 1)


def test_blocks_without_tokens_are_refused() -> None:
    with pytest.raises(InvalidKey):
        prefix_keys([1], 0)


# --- namespaces ------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=20)


@st.composite
def namespaces(draw: st.DrawFn) -> Namespace:
    block_bytes_max = draw(st.integers(1, BLOCK_BYTES_MAX))
    tp_size, pp_size = draw(st.integers(1, 64)), draw(st.integers(1, 64))
    return Namespace(
        model=draw(texts),
        revision=draw(texts),
        dtype=draw(st.sampled_from(sorted(ELEMENT_SIZES))),
        layout=draw(texts),
        tokens_per_block=draw(st.integers(1, 2**32)),
        block_bytes_max=block_bytes_max,
        layer_bytes=draw(st.none() | st.integers(1, block_bytes_max)),
        group=draw(st.integers(0, 2**32)),
        tp_rank=draw(st.integers(0, tp_size - 1)),
        tp_size=tp_size,
        pp_rank=draw(st.integers(0, pp_size - 1)),
        pp_size=pp_size,
        extra=draw(st.dictionaries(texts, texts | st.just(""), max_size=4)),
    )


@given(namespaces())
def test_descriptors_are_read_back_from_their_canonical_json(namespace: Namespace) -> None:
    data = namespace.canonical_json()
    again = Namespace.parse(data)
    assert again == namespace and hash(again) == hash(namespace) and again.digest == namespace.digest
    assert pickle.loads(pickle.dumps(namespace)) == namespace
    assert json.loads(data) == {name: getattr(namespace, name) for name in BASE | {"extra": 0}} | json.loads(data)


@given(namespaces(), namespaces())
def test_different_descriptors_have_different_digests(left: Namespace, right: Namespace) -> None:
    assert (left == right) == (left.digest == right.digest)


def test_the_order_of_extra_does_not_matter() -> None:
    left, right = Namespace(**BASE, extra={"a": "1", "b": "2"}), Namespace(**BASE, extra={"b": "2", "a": "1"})
    assert left.digest == right.digest
    with pytest.raises(TypeError):
        left.extra["c"] = "3"  # type: ignore[index]


def test_names_of_torch_dtypes_are_taken_with_their_prefix() -> None:
    assert Namespace(**(BASE | {"dtype": "torch.float32"})).digest == Namespace(**(BASE | {"dtype": "float32"})).digest


@pytest.mark.parametrize(
    ("dtype", "size"), [("uint8", 1), ("float8_e4m3fn", 1), ("bfloat16", 2), ("float16", 2), ("float32", 4), ("float64", 8)]
)
def test_element_sizes(dtype: str, size: int) -> None:
    assert Namespace(**(BASE | {"dtype": dtype})).element_size == size


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": ""},
        {"model": 3},
        {"model": "\ud800"},
        {"revision": ""},
        {"layout": "x" * 4097},
        {"dtype": "complex64"},
        {"tokens_per_block": 0},
        {"tokens_per_block": True},
        {"tokens_per_block": 1.0},
        {"block_bytes_max": BLOCK_BYTES_MAX + 1},
        {"layer_bytes": 0},
        {"layer_bytes": (1 << 20) + 1},
        {"group": -1},
        {"tp_rank": 1},
        {"pp_rank": 2, "pp_size": 2},
        {"tp_size": 0},
        {"extra": {"a": 1}},
        {"extra": {"": "a"}},
        {"extra": [("a", "b")]},
        {"extra": {str(i): "" for i in range(65)}},
        {"extra": {str(i): "x" * 4000 for i in range(20)}},
    ],
    ids=str,
)
def test_unusable_descriptors_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(wrong))):
        Namespace(**(BASE | wrong))


def test_a_changed_descriptor_is_another_namespace() -> None:
    namespace = Namespace(**BASE)
    changed = [dataclasses.replace(namespace, **{name: "other"}) for name in ("model", "revision", "layout")]
    changed += [dataclasses.replace(namespace, dtype="float16"), dataclasses.replace(namespace, extra={"x": "y"})]
    assert len({namespace.digest, *(other.digest for other in changed)}) == 6


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_no_descriptor(data: bytes) -> None:
    with pytest.raises(FormatError):
        Namespace.parse(data)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner, max_size=3)))
def test_arbitrary_values_in_a_descriptor_are_refused_or_kept(value: Any) -> None:
    values = json.loads(Namespace(**BASE).canonical_json())
    for name in values:
        data = json.dumps(values | {name: value}, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode(
            "utf-8", "surrogatepass"
        )
        try:
            assert Namespace.parse(data).canonical_json() == data
        except CorruptRecord:
            continue


@pytest.mark.parametrize(
    "data",
    [
        b"[]",
        b"{}",
        b"nul",
        b"[" * 50000,
        b'{"a":' * 9000 + b"1" + b"}" * 9000,
        b"9" * 5000,
        b" " * 70000,
        Namespace(**BASE).canonical_json().replace(b":", b": "),
        Namespace(**BASE).canonical_json().replace(b'"group":0', b'"group":0,"group":0'),
        Namespace(**BASE).canonical_json().replace(b'"m"', b'"\\u006d"'),
        Namespace(**BASE).canonical_json().replace(b'"bfloat16"', b'"torch.bfloat16"'),
    ],
    ids=["list", "empty", "cut", "deep list", "deep object", "long number", "too long", "spaces", "twice", "escape", "prefix"],
)
def test_other_spellings_are_damage(data: bytes) -> None:
    with pytest.raises(CorruptRecord):
        Namespace.parse(data)


def test_a_descriptor_of_a_newer_version_is_unsupported() -> None:
    data = Namespace(**BASE).canonical_json().replace(b'"group":0', b'"group":0,"hue":"red"')
    with pytest.raises(UnsupportedFormat, match="hue"):
        Namespace.parse(data)
