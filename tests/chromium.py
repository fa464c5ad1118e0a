"""Chromium for the tests in a browser; importing this skips a test module where it is missing."""

from __future__ import annotations

import importlib.util
import shutil

import pytest

HOW = "tests in a browser need one: apt install chromium, and pip install playwright"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
    pytest.skip(HOW, allow_module_level=True)
