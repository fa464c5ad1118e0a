"""Whether pictures are still the same ones, without reading them: their names, sizes, labels and order."""

from __future__ import annotations

import hashlib
import json
import os

from mar.data.bundled import FashionSource
from mar.data.examples import Source
from mar.data.folder import FolderSource
from mar.data.tars import TarSource


def source_digest(source: Source) -> str:
    """sha256, in hex, of a source's list: class names, and of each picture its label, name and size in bytes.

    Names in a folder are taken from there on, so that a folder may be moved; in tar files, they are the members'. Of a
    table, the pictures' sizes are taken, not their bytes; of another kind of source, the number of its pictures alone.
    """
    digest = hashlib.sha256(json.dumps([len(source), list(source.classes)]).encode())
    if isinstance(source, FashionSource):
        digest.update(source.split.encode())
    elif isinstance(source, FolderSource):
        _add_files(digest, source)
    elif isinstance(source, TarSource):
        for index, label in enumerate(source.labels):
            name, size = source.member(index)
            digest.update(b"%b\0%d %d\n" % (os.fsencode(name), label, size))
    else:
        from mar.data.tables import TableSource

        if isinstance(source, TableSource):
            _add_rows(digest, source)
    return digest.hexdigest()


def picture_names(source: Source) -> list[str] | None:
    """What tells each picture of a source from the others, also once more have come: its path in the folder, or shard
    and member. None for sources that have no names, or the same for several."""
    names: list[str] = []
    if isinstance(source, FolderSource):
        names = [os.fsdecode(file).replace(os.sep, "/") for file in source._files.tolist()]
    elif isinstance(source, TarSource):
        shards = [file.name for file in source.files]
        places = source._places[:, 0].tolist()
        names = [f"{shards[place]}/{source.member(index)[0]}" for index, place in enumerate(places)]
    return names if names and len({*names}) == len(names) else None


def _add_files(digest: hashlib._Hash, source: FolderSource) -> None:
    for file, label in zip(source._files, source.labels, strict=True):
        name = file.item()
        try:
            size = os.stat(os.path.join(os.fsencode(source.folder), name)).st_size
        except OSError:  # gone since the folder was listed: its picture will be one that can't be read
            size = -1
        digest.update(b"%b\0%d %d\n" % (name.replace(os.fsencode(os.sep), b"/"), label, size))


def _add_rows(digest: hashlib._Hash, source: object) -> None:
    from pyarrow import compute

    from mar.data.tables import TableSource

    assert isinstance(source, TableSource)
    for rows in source.table.with_format("arrow").iter(batch_size=1000):
        pictures = rows[source.columns.image]
        # The lengths of binary values are in their offsets: the pictures themselves are not read.
        sizes = compute.binary_length(compute.struct_field(pictures, "bytes")).to_pylist()
        paths = compute.struct_field(pictures, "path").to_pylist()
        labels = [None] * len(sizes)
        if source.columns.label is not None:
            labels = rows[source.columns.label].to_pylist()
        names = [os.path.basename(path or "") for path in paths]
        digest.update(json.dumps([sizes, names, labels]).encode())
