"""CUDA backend: the head's diffusion loop as a CUDA graph."""

from __future__ import annotations

from mar.backends.base import Backend
from mar.backends.cuda.graphs import graph_head

CUDA = Backend(sampling_head=graph_head, asynchronous=True)
