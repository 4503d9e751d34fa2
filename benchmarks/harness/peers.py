"""Which stores are compared, and where each of them is installed."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KVLODE = "kvlode"


@dataclass(frozen=True, slots=True)
class Peer:
    """One store. ``environment``: a folder below ``.engines``, or empty for the interpreter that runs the benchmark."""

    name: str
    title: str
    module: str
    kind: str
    environment: str = ""
    file_per_block: bool = False
    """Buffered, one file a block."""
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def python(self) -> str:
        if not self.environment:
            return sys.executable
        return os.fspath(ROOT / ".engines" / self.environment / "bin" / "python")

    @property
    def missing(self) -> str | None:
        """Why it cannot run here, as far as that shows without trying."""
        if Path(self.python).exists():
            return None
        return f"there is no environment .engines/{self.environment}: make bench-setup"


QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "LMCACHE_LOG_LEVEL": "ERROR", "LMCACHE_TRACK_USAGE": "false"}

PEERS = (
    Peer(KVLODE, "kvlode", "kvlode_store", "KvlodeStore"),
    Peer("lmcache_fs_native", "LMCache fs_native", "lmcache_l2", "FsNative", "lmcache", variables=QUIET),
    Peer("lmcache_raw_block", "LMCache raw_block", "lmcache_l2", "RawBlock", "lmcache", variables=QUIET),
    Peer("vllm_fs", "vLLM fs tier", "vllm_fs", "VllmFs", "vllm", variables=QUIET),
    Peer("sglang_file", "SGLang HiCacheFile", "sglang_file", "SglangFile", "sglang", file_per_block=True, variables=QUIET),
    Peer("aibrix_rocksdb", "AIBrix RocksDB", "aibrix_rocksdb", "AibrixRocksdb", "lmcache", variables=QUIET),
    Peer("rocksdb_blob", "RocksDB blob files", "rocksdb_blob", "RocksdbBlob"),
    Peer("safetensors", "safetensors files", "safetensors_files", "SafetensorsFiles", file_per_block=True),
    Peer("diskcache", "diskcache", "diskcache_files", "DiskcacheFiles", file_per_block=True),
)
NAMES = tuple(peer.name for peer in PEERS)
