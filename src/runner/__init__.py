"""Fine-tuning experiments that compose, launch, track and compare themselves."""

import os
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent
"""The folder of this package; in a checkout conf/ and uv.lock are two levels above it."""

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
"""PyTorch asks Linux for huge pages for large CPU tensors: 6 % less time per step. Read at its first tensor."""

ONEDNN_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
"""Environment variables: how many compiled products PyTorch and oneDNN keep. Read when PyTorch is loaded. A step of one
micro-batch has about 10 in float32 and 60 in bfloat16."""
if "torch" not in sys.modules:
    for name in ONEDNN_CACHES:
        os.environ.setdefault(name, "64")
