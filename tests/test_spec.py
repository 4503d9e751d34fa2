"""SPEC.md says what the code does: its generated parts are those of the code, and its fourteen parts are there."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

import make_spec
from kvlode.format.bytetable import ByteTable, Field, PageTable
from kvlode.format.namespace import Namespace
from kvlode.format.record import RECORD_TABLE
from kvlode.format.seal import COLUMN_TABLE, TOC_MAGIC, TOC_TABLE, TRAILER_TABLE
from kvlode.format.segment import SEGMENT_TABLE
from kvlode.format.stripe import STRIPE_DTYPE, STRIPE_TABLE
from kvlode.format.superblock import SUPERBLOCK_TABLE

TEXT = make_spec.SPEC.read_text()
PAGES = [SUPERBLOCK_TABLE, SEGMENT_TABLE, RECORD_TABLE, TRAILER_TABLE]


@pytest.mark.parametrize("name", sorted(make_spec.PARTS))
def test_a_generated_part_is_what_the_code_makes_now(name: str) -> None:
    parts = make_spec.parts_of(TEXT)
    assert name in parts, f"SPEC.md has no part {name}; run python tests/make_spec.py"
    assert parts[name] == make_spec.generated(name), "run python tests/make_spec.py and review the difference"


def test_every_generated_part_of_the_text_is_known() -> None:
    assert set(re.findall(r"<!-- generated: ([a-z-]+) -->", TEXT)) == set(make_spec.PARTS)


def test_the_text_has_its_fourteen_parts_in_order() -> None:
    assert re.findall(r"^## (\d+)\.", TEXT, re.MULTILINE) == [str(number) for number in range(1, 15)]


@pytest.mark.parametrize("table", PAGES, ids=lambda table: table.title)
def test_the_magic_in_a_table_is_the_magic_in_the_code(table: PageTable) -> None:
    assert table.fields[0].meaning.strip("`") == table.magic.hex(" ").upper()


def test_the_magic_of_the_table_of_contents_is_the_one_in_the_code() -> None:
    assert TOC_TABLE.fields[0].meaning.strip("`") == TOC_MAGIC.hex(" ").upper()


def test_magics_differ() -> None:
    assert len({*(table.magic for table in PAGES), TOC_MAGIC}) == 5


@pytest.mark.parametrize("table", [*PAGES, TOC_TABLE, STRIPE_TABLE, COLUMN_TABLE], ids=lambda table: table.title)
def test_structs_follow_the_table(table: ByteTable) -> None:
    assert table.struct.size == table.size_bytes == sum(field.size_bytes for field in table)
    assert len(set(table.names)) == len(table.names)


def test_the_stripe_array_follows_the_table() -> None:
    assert STRIPE_DTYPE.itemsize == STRIPE_TABLE.size_bytes
    assert {name: STRIPE_DTYPE.fields[name][1] for name in STRIPE_DTYPE.names or ()} == STRIPE_TABLE.offsets


def test_every_field_of_the_descriptor_is_described() -> None:
    assert set(make_spec.DESCRIPTOR) == {field.name for field in fields(Namespace)}


@pytest.mark.parametrize(
    "rows",
    [
        (Field(0, "u32", "a", ""), Field(8, "u32", "b", "")),
        (Field(0, "u32", "a", ""), Field(2, "u8[6]", "b", "")),
        (Field(0, "u32", "a", ""),),
    ],
    ids=["gap", "overlap", "short"],
)
def test_a_table_with_gaps_or_overlaps_is_refused(rows: tuple[Field, ...]) -> None:
    with pytest.raises(ValueError):
        ByteTable("wrong", 8, rows)
