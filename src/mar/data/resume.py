"""What a run keeps of its data, to go on from there and to notice where it has changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mar.config import ConfigError
from mar.data.examples import Source
from mar.data.latents import LatentSource
from mar.data.streams import StreamSource


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
