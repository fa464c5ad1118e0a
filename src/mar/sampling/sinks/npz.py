"""One `.npz` for the evaluation suite of ADM (Dhariwal and Nichol, 2021)."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from mar.checkpoint.files import require_room, write_atomically
from mar.config import ConfigError
from mar.sampling.plan import WorkUnit
from mar.sampling.sinks.base import Sink

WHOLE = "whole.npz"
"""File that earlier versions left in the parts when they were killed."""


class Npz(Sink):
    """`arr_0`: uint8 images (n, h, w, 3); `arr_1`: class numbers, int64, -1 for none and for images of prompts.

    Gray images get three equal channels. Until all are drawn, parts of them are in OUT.npz.parts. The manifest is
    OUT.npz.json.
    """

    @property
    def folder(self) -> Path:
        return self._beside(".parts")

    @property
    def manifest(self) -> Path:
        return self._beside(".json")

    def obstacle(self) -> Path | None:
        return self.job.out if self.job.out.exists() else None

    def names(self) -> set[str]:
        return {WHOLE, *(self._part(unit).name for unit in self.units)}

    def complete(self, existing: set[str]) -> bool:
        return self.job.out.is_file()

    def missing(self, existing: set[str]) -> list[WorkUnit]:
        missing = [unit for unit in self.units if self._part(unit).name not in existing]
        count = len(self.job.plan) + sum(len(unit) for unit in missing)  # parts to come, and the whole
        require_room(self.job.out.parent, count * int(np.prod(self._image_shape)))
        return missing

    def write(self, unit: WorkUnit, images: UInt8[np.ndarray, "n c h w"]) -> None:
        rgb = np.broadcast_to(images, (len(images), 3, *images.shape[2:])).transpose(0, 2, 3, 1)

        def save(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.save(file, np.ascontiguousarray(rgb))

        write_atomically(self._part(unit), save, temporary_in=self.job.out.parent)

    def finish(self, rank: int, world: int) -> None:
        if rank == 0 and not self.job.out.exists():
            write_atomically(self.job.out, self._assemble)

    def tidy(self) -> None:
        for name in self.names():
            (self.folder / name).unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _assemble(self, temporary: Path) -> None:
        """Joins the parts one by one, in constant memory, and without dates: bytes are always equal."""
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open(_member("arr_0"), "w", force_zip64=True) as member:
                member.write(_header("|u1", (len(self.job.plan), *self._image_shape)))
                for unit in self.units:
                    member.write(self._read(unit).data)
            with archive.open(_member("arr_1"), "w", force_zip64=True) as member:
                member.write(_header("<i8", (len(self.job.plan),)))
                member.write(np.asarray(self.job.plan.labels, dtype="<i8").data)

    def _read(self, unit: WorkUnit) -> np.ndarray:
        path, expected = self._part(unit), (len(unit), *self._image_shape)
        try:
            part: np.ndarray = np.load(path, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ConfigError(f"{path} is damaged; delete it, and the same command draws it again") from error
        if part.dtype != np.uint8 or part.shape != expected:
            raise ConfigError(f"{path} has no uint8 {expected}; delete it, and the same command draws it again")
        return part

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        return (*self.job.shape[1:], 3)

    def _part(self, unit: WorkUnit) -> Path:
        return self.folder / f"{self.job.name(unit.first)}.npy"

    def _beside(self, ending: str) -> Path:
        return self.job.out.with_name(self.job.out.name + ending)


def _member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, where zip's time begins
    info.create_system = 3
    return info


def _header(dtype: str, shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue()
