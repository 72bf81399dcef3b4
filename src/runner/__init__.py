import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
"""PyTorch asks Linux for huge pages where a tensor on the CPU is large: 6 % less time. It looks at its first tensor."""
