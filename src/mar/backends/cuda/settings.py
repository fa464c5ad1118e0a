"""Settings of the process for CUDA: TF32, and the kernels of attention."""

from __future__ import annotations

import torch


def set_tf32(allowed: bool) -> None:
    """Round inputs of float32 products and convolutions to TF32, or keep them.

    TF32 has 10 bits of mantissa. PyTorch's default keeps products, but rounds convolutions: all of KL-16.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def choose_attention() -> None:
    """Let attention run as FlashAttention, memory-efficient or plain: all but cuDNN's.

    That makes a plan for every shape, in up to 0.4 s, and here the length changes at every reveal and training step.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_flash_sdp(True)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.backends.cuda.enable_math_sdp(True)
