"""A stand-in for SGLang's host pools: the same layouts, described by views of a tensor, and what the adapter asks of a pool."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

MHA_LAYOUTS = ("layer_first", "page_first", "page_first_direct", "page_head")
MLA_LAYOUTS = ("layer_first", "page_first", "page_first_direct")
PAGES, TOKENS, LAYERS, HEADS, DIM = 16, 16, 4, 4, 64
UNTOUCHED = 0xA5


class HostPool:
    """``pages`` pages of ``tokens`` tokens. With ``mla`` there is one latent head and no V."""

    device = "cpu"
    start_layer = 0

    def __init__(
        self,
        layout: str = "page_first",
        *,
        mla: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        tokens: int = TOKENS,
        dim: int = DIM,
        pages: int = PAGES,
    ) -> None:
        self.layout, self.dtype, self.mla = layout, dtype, mla
        self.page_size, self.layer_num, self.end_layer = tokens, LAYERS, LAYERS
        self.head_num, self.head_dim = (1 if mla else HEADS), dim
        row = (self.head_num, dim)
        shape = {
            "layer_first": (LAYERS, pages * tokens, *row),
            "page_first": (pages * tokens, LAYERS, *row),
            "page_first_direct": (pages, LAYERS, tokens, *row),
            "page_head": (pages, self.head_num, tokens, LAYERS, dim),
        }[layout]
        self.kv_buffer = torch.zeros(shape if mla else (2, *shape), dtype=dtype)
        self._page_shape = self._page(0).shape
        self.page_bytes = self._page(0).nbytes

    def _halves(self) -> list[torch.Tensor]:
        return [self.kv_buffer] if self.mla else list(self.kv_buffer)

    def _page(self, page: int) -> torch.Tensor:
        """A view of one page, not contiguous in most layouts."""
        buffer = self.kv_buffer if not self.mla else self.kv_buffer[None]
        tokens = slice(page * self.page_size, (page + 1) * self.page_size)
        if self.layout == "layer_first":
            return buffer[:, :, tokens]
        return buffer[:, tokens] if self.layout == "page_first" else buffer[:, page : page + 1]

    def parts(self, page: int) -> Iterator[torch.Tensor]:
        """The contiguous parts of a page, in the order in which SGLang names them."""
        tokens = slice(page * self.page_size, (page + 1) * self.page_size)
        if self.layout == "layer_first":
            yield from (half[layer, tokens] for layer in range(self.layer_num) for half in self._halves())
        elif self.layout == "page_first":
            yield from (half[tokens] for half in self._halves())
        else:
            yield from (half[page] for half in self._halves())

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        assert len(indices) % self.page_size == 0
        parts = [part for first in indices[:: self.page_size].tolist() for part in self.parts(first // self.page_size)]
        assert all(part.is_contiguous() for part in parts)
        return [part.data_ptr() for part in parts], [part.nbytes for part in parts]

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        page = self._page(int(index) // self.page_size)
        return page.flatten() if flat else page

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros(self._page_shape, dtype=self.dtype).flatten()

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        self._page(int(index) // self.page_size)[:] = data_page.reshape(self._page_shape)

    # --- for tests ----------------------------------------------------------------------------------------------------

    def indices(self, pages: Sequence[int]) -> torch.Tensor:
        return torch.cat([torch.arange(page * self.page_size, (page + 1) * self.page_size) for page in pages])

    def write(self, page: int, data: np.ndarray) -> None:
        """Set the bytes of a page, in the order of its parts."""
        position = 0
        for part in self.parts(page):
            part.view(torch.uint8).view(-1)[:] = torch.from_numpy(data[position : position + part.nbytes].copy())
            position += part.nbytes
        assert position == len(data)

    def read(self, page: int) -> np.ndarray:
        return np.concatenate([part.contiguous().view(torch.uint8).view(-1).numpy() for part in self.parts(page)])

    def blank(self) -> None:
        self.kv_buffer.view(torch.uint8)[:] = UNTOUCHED


@dataclass
class StorageConfig:
    """The fields of ``HiCacheStorageConfig`` of SGLang 0.5.23."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    attn_cp_rank: int = 0
    attn_cp_size: int = 1
    is_mla_model: bool = False
    enable_storage_metrics: bool = False
    is_page_first_layout: bool = True
    model_name: str | None = "model"
    dp_rank: int = 0
    extra_config: dict[str, Any] | None = None
    dcp_size: int = 1
    dcp_rank: int = 0

    @property
    def is_storage_writer(self) -> bool:
        return not self.is_mla_model or self.tp_rank == self.dcp_rank


@dataclass
class ExtraInfo:
    """The fields of ``HiCacheStorageExtraInfo``."""

    prefix_keys: list[str] | None = None


def keys_of(prefix: Sequence[int]) -> list[str]:
    """Page hashes as SGLang has them: hexadecimal digits of a SHA-256."""
    return [hashlib.sha256(block.to_bytes(8, "little")).hexdigest() for block in prefix]
