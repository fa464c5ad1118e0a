"""Image generation with a masked autoregressive transformer and a diffusion loss (MAR, arXiv 2406.11838)."""

from __future__ import annotations

__version__ = "0.1.0"
