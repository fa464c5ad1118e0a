"""Bounds on gradio's queue, with a queue that keeps what gradio's keeps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

from mar.app import queueing
from mar.app.queueing import Streams


class FakeQueue:
    """What `Streams` uses of gradio's queue."""

    def __init__(self) -> None:
        functions = ("draw", "models")
        self.blocks = SimpleNamespace(
            fns={number: SimpleNamespace(api_name=name) for number, name in enumerate(functions)}
        )
        self.event_queue_per_concurrency_id = {name: SimpleNamespace(queue=[]) for name in functions}
        self.event_ids_to_events: dict[str, Any] = {}
        self.pending_messages_per_session: dict[str, asyncio.Queue[str]] = {}
        self.pending_event_ids_session: dict[str, set[str]] = {}
        self.max_size: int | None = 1
        self.ANALYTICS_MAX_EVENTS = 5
        self.cleaned: list[str] = []

    async def push(self, body: Any, request: Any, username: str | None) -> tuple[bool, str, str]:
        function = self.blocks.fns[body.fn_index]
        event = SimpleNamespace(fn=function, data=body, session_hash=body.session)
        self.event_queue_per_concurrency_id[function.api_name].queue.append(event)
        self.event_ids_to_events[body.session] = event
        self.pending_messages_per_session[body.session] = asyncio.Queue()
        self.pending_event_ids_session[body.session] = {body.session}
        return True, body.session, "success"

    async def clean_events(self, *, session_hash: str) -> None:
        self.cleaned.append(session_hash)
        for waiting in self.event_queue_per_concurrency_id.values():
            waiting.queue = [event for event in waiting.queue if event.session_hash != session_hash]

    def finish(self, session: str) -> None:
        """Deliver the last event of a call."""
        self.pending_event_ids_session[session].clear()
        del self.event_ids_to_events[session]


def run(test: Callable[[FakeQueue, Streams], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        queue, streams = FakeQueue(), Streams(drawing=["draw"])
        streams.bind(queue)
        assert queue.max_size is None
        await test(queue, streams)

    asyncio.run(main())


async def call(queue: Any, session: str, function: int = 0, size: int = 0) -> Any:
    body = SimpleNamespace(fn_index=function, data=["x" * size, 1, None], session=session)
    return await queue.push(body=body, request=None, username=None)


def test_push_beyond_the_bound_is_busy_for_drawing_alone() -> None:
    async def test(queue: FakeQueue, streams: Streams) -> None:
        answers = await asyncio.gather(*(call(queue, f"draw{i}") for i in range(queueing.MAX_QUEUE + 9)))
        assert [answer[2] for answer in answers] == ["success"] * queueing.MAX_QUEUE + ["queue_full"] * 9
        assert answers[-1][1] == "busy: 32 requests wait; try again in a moment"
        answers = [await call(queue, f"models{i}", 1) for i in range(queueing.MAX_ANSWERS + 1)]
        assert [answer[0] for answer in answers] == [True] * queueing.MAX_ANSWERS + [False]

    run(test)


def test_push_beyond_the_bytes_that_may_wait_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queueing, "MAX_WAITING_BYTES", 100)

    async def test(queue: FakeQueue, streams: Streams) -> None:
        assert (await call(queue, "large", size=500))[0]  # alone it may be as large as a body may be
        assert not (await call(queue, "next"))[0]
        await queue.clean_events(session_hash="large")
        assert [(await call(queue, name, size=50))[0] for name in "abc"] == [True, True, False]

    run(test)


def test_open_of_a_stream_is_possible_once_after_its_call() -> None:
    async def test(queue: FakeQueue, streams: Streams) -> None:
        assert not streams.open("one")
        await call(queue, "one")
        streams.begin("one")
        assert streams.open("one")
        assert not streams.open("one")
        queue.finish("one")
        await streams.close("one", gone=False)
        assert not queue.pending_messages_per_session
        assert not queue.pending_event_ids_session

    run(test)


def test_close_of_a_client_that_is_gone_stops_its_calls() -> None:
    async def test(queue: FakeQueue, streams: Streams) -> None:
        await call(queue, "one")
        streams.begin("one")
        streams.open("one")
        await streams.close("one", gone=True)
        assert queue.cleaned == ["one"]
        assert not queue.pending_messages_per_session
        assert not queue.event_queue_per_concurrency_id["draw"].queue

    run(test)


@pytest.mark.parametrize("gone", [False, True])
def test_close_keeps_what_was_called_meanwhile_in_the_session(gone: bool) -> None:
    async def test(queue: FakeQueue, streams: Streams) -> None:
        await call(queue, "session")
        streams.begin("session")
        streams.open("session")
        queue.finish("session")
        await call(queue, "session")
        streams.begin("session")
        await streams.close("session", gone)
        assert queue.cleaned == []
        assert streams.open("session")

    run(test)


def test_begin_drops_calls_that_nobody_reads_after_a_time_or_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queueing, "UNREAD_S", 0.2)
    monkeypatch.setattr(queueing, "MAX_UNREAD", 2)

    async def test(queue: FakeQueue, streams: Streams) -> None:
        for name in ("one", "read", "two", "three"):
            await call(queue, name)
            streams.begin(name)
            if name == "read":
                assert streams.open(name)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert queue.cleaned == ["one"]
        for _ in range(200):
            await asyncio.sleep(0.05)
            if len(queue.cleaned) == 3:
                break
        assert queue.cleaned == ["one", "two", "three"]
        assert list(queue.pending_messages_per_session) == ["read"]
        assert not streams.open("two")

    run(test)


def test_begin_again_while_the_session_is_read_drops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queueing, "UNREAD_S", 0.01)

    async def test(queue: FakeQueue, streams: Streams) -> None:
        await call(queue, "session")
        streams.begin("session")
        streams.open("session")
        streams.begin("session")  # its next call comes by the same stream
        await asyncio.sleep(0.1)
        assert queue.cleaned == []

    run(test)


def test_behind_tells_of_many_unread_events_or_no_session() -> None:
    async def test(queue: FakeQueue, streams: Streams) -> None:
        await call(queue, "one")
        messages = queue.pending_messages_per_session["one"]
        for _ in range(queueing.MAX_BEHIND):
            messages.put_nowait("event")
        assert not streams.behind("one")
        messages.put_nowait("event")
        assert streams.behind("one")
        assert streams.behind("nosuch")
        assert streams.behind(None)

    run(test)
