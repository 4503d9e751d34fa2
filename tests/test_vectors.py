"""The test vectors: kvlode makes and reads the bytes that are checked in, and so does a reader that knows only SPEC.md."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import zstandard

import make_vectors
import spec_reader

VECTORS = make_vectors.all_vectors()
MANIFEST: dict[str, Any] = json.loads((make_vectors.FOLDER / "MANIFEST.json").read_text())


def stored_document(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((make_vectors.FOLDER / name / "expected.json").read_text())
    return document


def stored_bytes(name: str) -> bytes:
    path = make_vectors.FOLDER / name / "data.bin"
    return path.read_bytes() if path.exists() else b""


def has_frames(data: bytes) -> bool:
    """Whether the bytes hold a zstd frame, whose exact bytes depend on the version of the library."""
    return b"\x28\xb5\x2f\xfd" in data


@pytest.mark.parametrize("name", sorted(VECTORS))
def test_kvlode_reads_what_the_vector_expects(name: str) -> None:
    document = stored_document(name)
    assert make_vectors.describe(document["structure"], stored_bytes(name)) == document["expected"]


@pytest.mark.parametrize("name", sorted(VECTORS))
def test_a_reader_written_from_the_text_finds_the_same(name: str) -> None:
    found, expected = spec_reader.read_vector(make_vectors.FOLDER / name)
    assert found == expected


@pytest.mark.parametrize("name", sorted(VECTORS))
def test_kvlode_still_writes_the_same_bytes(name: str) -> None:
    structure, text, data = VECTORS[name]
    stored = stored_bytes(name)
    here = ".".join(map(str, zstandard.ZSTD_VERSION))
    if here != MANIFEST["zstd_version"] and has_frames(stored):
        pytest.skip(f"zstd {here} may lay other frames than {MANIFEST['zstd_version']}, with which the vectors were made")
    assert data == stored
    assert make_vectors.document(structure, text, data) == stored_document(name)


def test_the_folder_holds_the_vectors_of_the_manifest_and_stays_small() -> None:
    folders = {path.name for path in make_vectors.FOLDER.iterdir() if path.is_dir()}
    assert folders == set(MANIFEST["vectors"]) == set(VECTORS)
    assert {name: text for name, (_, text, _) in VECTORS.items()} == MANIFEST["vectors"]
    assert sum(path.stat().st_size for path in make_vectors.FOLDER.rglob("*") if path.is_file()) < 2 << 20


def test_the_second_reader_does_not_know_kvlode() -> None:
    imports = [
        node for node in ast.walk(ast.parse(Path(spec_reader.__file__).read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
    assert names <= {"__future__", "hashlib", "json", "pathlib", "struct", "typing", "xxhash", "zstandard"}
