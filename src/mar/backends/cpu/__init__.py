"""CPU backend: oneDNN products, dropout and attention kernels, packed weights, padding."""

from __future__ import annotations

from mar.backends.base import Backend
from mar.backends.cpu.attention import attention_with_dropout
from mar.backends.cpu.dropout import fast_dropout
from mar.backends.cpu.linear import fast_linear
from mar.backends.cpu.packed_head import pack_head
from mar.backends.cpu.trunk import bucketed_trunk, free_memory

CPU = Backend(
    linear=fast_linear,
    dropout=fast_dropout,
    attention_with_dropout=attention_with_dropout,
    trunk=bucketed_trunk,
    sampling_head=pack_head,
    free_memory=free_memory,
)
