"""Sinks of many images: a folder of PNGs, an `.npz` for ADM's suite, WebDataset shards."""

from mar.sampling.sinks.base import Job, Sink, prepare, write_all
from mar.sampling.sinks.folder import PngFolder
from mar.sampling.sinks.npz import Npz
from mar.sampling.sinks.shards import Shards

SINKS: dict[str, type[Sink]] = {"png": PngFolder, "npz": Npz, "webdataset": Shards}
"""Formats by name."""

__all__ = ["SINKS", "Job", "Npz", "PngFolder", "Shards", "Sink", "prepare", "write_all"]
