"""Whether pictures are still the same ones, without reading them: their names, sizes, labels and order.

What a run keeps of its data, to go on from there and to notice where it has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from mar.config import ConfigError
from mar.data.folder import FolderSource
from mar.data.images import Source
from mar.data.latent_cache import LatentSource
from mar.data.sources import FashionSource
from mar.data.stream import StreamSource
from mar.data.webdataset import TarSource


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
        from mar.data.parquet import TableSource

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

    from mar.data.parquet import TableSource

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


def data_state(source: Source | LatentSource | StreamSource) -> dict[str, Any]:
    """JSON-able; every process has to ask for it."""
    if isinstance(source, StreamSource):
        return source.state_dict()
    return {"pictures": len(source), "classes": list(source.classes)}


def resume_data(
    source: Source | LatentSource | StreamSource,
    state: Mapping[str, Any] | None,
    images: int,
    *,
    by_place: bool = False,
) -> str | None:
    """Goes on from the data's saved state after `images` pictures; returns what people should know of it, if anything.

    `state` is None where an older version saved none. The order of all but streams follows from the position alone, but
    not if the number of pictures has changed. ConfigError where the classes are others: what was learned of one would
    go on with another; and where the number is another and pictures are held out `by_place`, as older versions did.
    """
    if state is None:
        return None
    if isinstance(source, StreamSource):
        return source.load_state_dict(dict(state), images)
    now, then = list(source.classes), state.get("classes", list(source.classes))
    if now != then:
        names = sorted(set(now) ^ set(then))
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise ConfigError(
            f"the data has other classes than when the run was saved ({shown or 'in another order'}); put them back, "
            "or begin another run"
        )
    if len(source) == state["pictures"]:
        return None
    if by_place:
        raise ConfigError(
            f"the data has {len(source):,} pictures to learn from, but {state['pictures']:,} when the run was saved by "
            "an older version, which did not note those it held out: they would be mixed with those learned from; put "
            "the pictures back, or begin another run"
        )
    return (
        f"warning: the data holds {len(source):,} pictures, but {state['pictures']:,} when the run was saved: it goes "
        "on in another order, in which pictures of this epoch may come twice or not at all"
    )
