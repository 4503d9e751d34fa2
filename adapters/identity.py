"""Which weights made a block: the ``revision`` of a namespace, from the files that the model is loaded from."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
WEIGHT_BYTES_MIN = 1 << 20
"""A file of another kind that is so large may be weights as well."""
DESCRIPTIONS = (
    *("config.json", "params.json", "adapter_config.json"),
    *("quantization_config.json", "quantize_config.json", "hf_quant_config.json"),
)
INDEX_SUFFIX = ".index.json"
_SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})(?:/|$)")


def weights_revision(model: str | os.PathLike[str], *, commit: str | None = None, settings: Mapping[str, Any] | None = None) -> str:
    """32 hexadecimal digits that change with the weights and with how they are used.

    ``model``: a folder (or one file) of weights, or the name of a model of a hub. For a folder they depend on its
    configuration and weight index byte for byte and on names, sizes and modification times of the weight files, or, in a
    hub's cache, on the commit that the folder is named after. For a name they depend on ``commit``. ``settings`` are
    whatever else changes the bytes of a KV block: quantisation, KV scales, RoPE scaling.

    Raises ``OSError`` when the files cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    path = Path(model) if os.path.exists(model) else None
    snapshot = _SNAPSHOT.search(os.path.abspath(model)) or _SNAPSHOT.search(os.path.realpath(model))
    if snapshot is not None:
        _add(digest, "commit", snapshot[1])
        _add(digest, "file", path.name if path is not None and path.is_file() else "")
    elif path is not None:
        for name, what in _files(path):
            _add(digest, name, what)
    else:
        _add(digest, "name", os.fspath(model))
    _add(digest, "given commit", commit or "")
    _add(digest, "settings", json.dumps(settings or {}, sort_keys=True, default=str))
    return digest.hexdigest()


def hub_commit(model: str, revision: str | None = None) -> str | None:
    """The commit of a hub's model ``org/name`` that this machine's cache holds, without asking the hub; ``None`` when it has none.

    ``revision``: a branch, a tag or a commit; ``None`` is ``main``. What is a folder or file here is no model of a hub.
    """
    if os.path.exists(model):
        return None
    wanted = revision or "main"
    if re.fullmatch(r"[0-9a-f]{40}", wanted):
        return wanted
    try:
        commit = (hub_folder(model) / "refs" / wanted).read_text().strip()
    except (OSError, ValueError):
        return None
    return commit if re.fullmatch(r"[0-9a-f]{40}", commit) else None


def hub_folder(model: str) -> Path:
    """Where the hub's client keeps what it downloaded of a model ``org/name``: ``refs``, and ``snapshots`` by commit."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return Path(cache, "models--" + model.replace("/", "--"))


def _files(path: Path) -> list[tuple[str, str]]:
    """What tells one set of weight files from another, in a fixed order."""
    if path.is_file():
        return [(path.name, _stamp(path))]
    found: list[tuple[str, str]] = []
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (Path(folder, name) for name in sorted(names)):
            name = file.relative_to(path).as_posix()
            if file.name in DESCRIPTIONS or file.name.endswith(INDEX_SUFFIX):
                found.append((name, hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()))
            elif file.suffix in WEIGHT_SUFFIXES or file.stat().st_size >= WEIGHT_BYTES_MIN:
                found.append((name, _stamp(file)))
    return found


def _stamp(file: Path) -> str:
    status = file.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _add(digest: Any, name: str, value: str) -> None:
    """One field, with the lengths, so that no two lists of fields look the same."""
    for text in (name, value):
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
