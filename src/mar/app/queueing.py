"""Bounds on gradio's queue: how much waits in it, and how long unread events are kept.

gradio keeps the events of each session until its stream is read, and forgets a session never. A client that calls and
goes away would cost memory, and the processor until its pictures are drawn.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Collection
from typing import Any

MAX_QUEUE = 32
"""Requests that may wait for the processor; the next one is told to come again."""
MAX_ANSWERS = 256
"""Calls that may wait though they are answered at once, such as `stop`."""
MAX_WAITING_BYTES = 96 * 2**20
"""Most characters of all requests that wait: they have pictures inside."""
UNREAD_S = 60.0
"""After this time a call is dropped if nobody reads its stream."""
MAX_UNREAD = 128
"""Most calls whose streams nobody reads; the oldest are dropped."""
MAX_BEHIND = 16
"""Unread events of a session from which on it gets no more previews."""


class Streams:
    """The event streams of the API: each is read after its call, or dropped.

    A stream is called by its event, or by its session if the client has named one. All methods are called on the
    server's event loop.

    Args:
        drawing: names of the functions that wait for the processor.
    """

    def __init__(self, drawing: Collection[str]) -> None:
        self.drawing = drawing
        self._queue: Any = None
        self._unread: OrderedDict[str, asyncio.TimerHandle] = OrderedDict()
        self._readers: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()

    def bind(self, queue: Any) -> None:
        """Take charge of gradio's queue."""
        self._queue, self._push = queue, queue.push
        queue.push = self._push_if_room
        queue.max_size = None  # it would refuse `stop`, too
        queue.ANALYTICS_MAX_EVENTS = 0  # statistics by pandas after each event, for a page that is off

    @property
    def bound(self) -> bool:
        """Tell whether there is a queue yet."""
        return self._queue is not None

    def begin(self, name: str) -> None:
        """Let the stream of a call be read once."""
        self._forget(name)
        self._unread[name] = asyncio.get_running_loop().call_later(UNREAD_S, self._expire, name)
        while len(self._unread) > MAX_UNREAD:
            self._expire(next(iter(self._unread)))

    def open(self, name: str) -> bool:
        """Open a stream for a reader; returns whether there is one."""
        if not self._forget(name):
            return False
        self._readers[name] += 1
        return True

    async def close(self, name: str, gone: bool) -> None:
        """End the reading of a stream.

        Args:
            name: of the stream.
            gone: whether the client has gone away; its calls are stopped then.
        """
        self._readers[name] -= 1
        if self._readers[name] <= 0:
            del self._readers[name]
        if name in self._unread:  # another call of the session
            self.begin(name)
        elif not self._readers[name] and (gone or not self._queue.pending_event_ids_session.get(name)):
            await self._drop(name)

    def behind(self, event: str | None) -> bool:
        """Tell whether a client reads slower than events come."""
        known = self._queue.event_ids_to_events.get(event)
        messages = None if known is None else self._queue.pending_messages_per_session.get(known.session_hash)
        return messages is None or messages.qsize() > MAX_BEHIND

    async def _push_if_room(self, body: Any, request: Any, username: str | None) -> Any:
        """Add a call to gradio's queue; answers "queue_full" if there is no room."""
        queues = self._queue.event_queue_per_concurrency_id.values()
        waiting = [event for queue in queues for event in queue.queue]
        drawing = self._draws(self._queue.blocks.fns[body.fn_index])
        rivals = [event for event in waiting if self._draws(event.fn) == drawing]
        size = sum(_size(event.data.data) for event in waiting if event.data is not None)
        if len(rivals) >= (MAX_QUEUE if drawing else MAX_ANSWERS) or (
            waiting and size + _size(body.data) > MAX_WAITING_BYTES
        ):
            return False, f"busy: {len(rivals)} requests wait; try again in a moment", "queue_full"
        return await self._push(body=body, request=request, username=username)

    def _draws(self, function: Any) -> bool:
        return function.api_name in self.drawing

    def _forget(self, name: str) -> bool:
        timer = self._unread.pop(name, None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    def _expire(self, name: str) -> None:
        """Drop a call that nobody has read; its stream can't be opened any more."""
        self._forget(name)
        if not self._readers[name]:
            task = asyncio.get_running_loop().create_task(self._drop(name))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _drop(self, name: str) -> None:
        """Stop the calls of a stream and remove its events."""
        await self._queue.clean_events(session_hash=name)
        self._queue.pending_messages_per_session.pop(name, None)
        self._queue.pending_event_ids_session.pop(name, None)


def _size(data: list[Any] | None) -> int:
    return sum(len(each) for each in data or () if isinstance(each, str))
