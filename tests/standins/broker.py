"""A stand-in for the message broker of Globus Compute: AMQP 0-9-1, as far as its SDK and its endpoint speak it.

Everything is in memory, for one test run. What it keeps of a broker: exchanges (direct and topic), queues, publisher
confirms, acknowledgements, redelivery of what a lost consumer had not acknowledged, exclusive consumers, returns of
what no queue takes. What it leaves out: accounts, TLS, persistence, limits, heartbeats that are missed.
"""

from __future__ import annotations

import asyncio
import fnmatch
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

from pika import frame, spec  # type: ignore[import-untyped]

FRAME_MAX: Final = 131_072
_ROOM: Final = FRAME_MAX - spec.FRAME_HEADER_SIZE - spec.FRAME_END_SIZE
_CAPABILITIES: Final = {"publisher_confirms": True, "basic.nack": True, "consumer_cancel_notify": True}


@dataclass(frozen=True)
class Message:
    exchange: str
    key: str
    properties: spec.BasicProperties
    body: bytes
    redelivered: bool = False


class Sink(Protocol):
    """Who takes the messages of a consumer."""

    @property
    def takes_more(self) -> bool: ...

    def deliver(self, queue: Queue, consumer: Consumer, message: Message) -> None: ...


@dataclass(frozen=True, eq=False)
class Consumer:
    channel: Sink
    tag: str
    without_ack: bool
    exclusive: bool


@dataclass(eq=False)
class Queue:
    name: str
    ready: deque[Message] = field(default_factory=deque)
    consumers: deque[Consumer] = field(default_factory=deque)

    def put(self, message: Message) -> None:
        self.ready.append(message)
        self.deliver()

    def deliver(self) -> None:
        """Hand out what waits, to each consumer in turn that may have more."""
        while self.ready:
            able = next((one for one in self.consumers if one.channel.takes_more), None)
            if able is None:
                return
            self.consumers.remove(able)
            self.consumers.append(able)
            able.channel.deliver(self, able, self.ready.popleft())


class _Inside:
    """A consumer in this process."""

    takes_more = True

    def __init__(self, heard: Callable[[bytes], object]) -> None:
        self._heard = heard

    def deliver(self, queue: Queue, consumer: Consumer, message: Message) -> None:  # noqa: ARG002
        self._heard(message.body)


class Broker:
    """A broker while the `with` block runs; `url` is where."""

    def __init__(self) -> None:
        self.queues: dict[str, Queue] = {}
        self.exchanges: dict[str, str] = {"": "direct"}
        self.bindings: set[tuple[str, str, str]] = set()  # exchange, pattern, queue
        self.connections: set[Connection] = set()
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, name="broker")

    def __enter__(self) -> Broker:
        self._thread.start()
        assert self._listening.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()

    def declare(self, queue: str, *, exchange: str = "", kind: str = "direct", pattern: str = "") -> None:
        """Make a queue, and bind it to an exchange. From any thread; what clients send later finds them."""

        def now() -> None:
            self.queues.setdefault(queue, Queue(queue))
            if exchange:
                self.exchanges.setdefault(exchange, kind)
                self.bindings.add((exchange, pattern or queue, queue))

        self._loop.call_soon_threadsafe(now)

    def publish(self, queue: str, body: bytes, properties: spec.BasicProperties) -> None:
        """Put a message into a queue; lost when there is none. From any thread."""

        def now() -> None:
            if queue in self.queues:
                self.queues[queue].put(Message("", queue, properties, body))

        self._loop.call_soon_threadsafe(now)

    def listen(self, queue: str, heard: Callable[[bytes], object]) -> None:
        """Hand every message of a queue to a function, in the broker's thread."""
        one = Consumer(_Inside(heard), "", without_ack=True, exclusive=True)
        self._loop.call_soon_threadsafe(lambda: self.queues[queue].consumers.append(one))

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self.url = f"amqp://guest:guest@127.0.0.1:{port}/%2F"
        self._listening.set()
        await self._stop.wait()
        server.close()
        tasks = [one.task for one in self.connections if one.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(self, writer)
        connection.task = asyncio.current_task()
        self.connections.add(connection)
        try:
            await connection.run(reader)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.connections.discard(connection)
            connection.close()

    def queues_for(self, exchange: str, key: str) -> list[Queue]:
        if not exchange:
            return [self.queues[key]] if key in self.queues else []
        topic = self.exchanges[exchange] == "topic"
        names = {
            queue
            for bound, pattern, queue in self.bindings
            # "#" alone is the one pattern with more than one word that anybody here binds
            if bound == exchange
            and (pattern == key or (topic and fnmatch.fnmatch(key, pattern.replace("#", "*"))))
        }
        return [self.queues[name] for name in sorted(names) if name in self.queues]


class Connection:
    """One client: frames in, frames out."""

    def __init__(self, broker: Broker, writer: asyncio.StreamWriter) -> None:
        self.broker = broker
        self.task: asyncio.Task[None] | None = None
        self._writer = writer
        self._channels: dict[int, Channel] = {}
        self._beating = asyncio.ensure_future(self._beat())

    async def run(self, reader: asyncio.StreamReader) -> None:
        came = b""
        while block := await reader.read(1 << 16):
            came += block
            while True:
                consumed, one = frame.decode_frame(came)
                if not consumed:
                    break
                came = came[consumed:]
                if self._handle(one):
                    await self._writer.drain()
                    return
            await self._writer.drain()

    def send(self, one: frame.Frame) -> None:
        if not self._writer.is_closing():
            self._writer.write(one.marshal())

    def method(self, channel: int, method: Any) -> None:
        self.send(frame.Method(channel, method))

    def close(self) -> None:
        self._beating.cancel()
        for channel in self._channels.values():
            channel.close()
        self._writer.close()

    def _handle(self, one: Any) -> bool:
        """Whether the connection is over."""
        if isinstance(one, frame.ProtocolHeader):
            about = {"product": "stand-in", "capabilities": _CAPABILITIES}
            self.method(0, spec.Connection.Start(0, 9, about, "PLAIN", "en_US"))
        elif isinstance(one, frame.Heartbeat):
            pass
        elif one.channel_number:
            self._on_channel(one.channel_number, one)
        elif isinstance(one.method, spec.Connection.StartOk):
            self.method(0, spec.Connection.Tune(2047, FRAME_MAX, 60))
        elif isinstance(one.method, spec.Connection.Open):
            self.method(0, spec.Connection.OpenOk())
        elif isinstance(one.method, spec.Connection.Close):
            self.method(0, spec.Connection.CloseOk())
            return True
        return False

    def _on_channel(self, number: int, one: Any) -> None:
        if isinstance(one, frame.Method) and isinstance(one.method, spec.Channel.Open):
            self._channels[number] = Channel(self, number)
            self.method(number, spec.Channel.OpenOk())
        elif isinstance(one, frame.Method) and isinstance(one.method, spec.Channel.CloseOk):
            pass
        elif number in self._channels and self._channels[number].handle(one):
            self._channels.pop(number).close()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(20)
            self.send(frame.Heartbeat())


class Channel:
    """One channel of a connection: what it consumes, and what it has not acknowledged."""

    def __init__(self, connection: Connection, number: int) -> None:
        self._broker = connection.broker
        self._connection = connection
        self._number = number
        self._unacknowledged: dict[int, tuple[Queue, Message]] = {}
        self._prefetch = 0
        self._delivered = 0
        self._published = 0
        self._confirming = False
        self._incoming: tuple[spec.Basic.Publish, spec.BasicProperties | None, int] | None = None
        self._body = b""
        self._methods: dict[type, Callable[[Any], Any]] = {
            spec.Exchange.Declare: self._declare_exchange,
            spec.Queue.Declare: self._declare_queue,
            spec.Queue.Bind: self._bind,
            spec.Queue.Purge: self._purge,
            spec.Queue.Delete: self._delete,
            spec.Basic.Qos: self._qos,
            spec.Basic.Consume: self._consume,
            spec.Basic.Cancel: self._cancel,
            spec.Basic.Publish: self._publish,
            spec.Basic.Ack: lambda asked: self._settle(asked.delivery_tag, multiple=asked.multiple),
            spec.Basic.Nack: lambda asked: self._settle(
                asked.delivery_tag, multiple=asked.multiple, again=asked.requeue
            ),
            spec.Basic.Reject: lambda asked: self._settle(asked.delivery_tag, again=asked.requeue),
            spec.Confirm.Select: self._confirm,
            spec.Channel.Close: lambda _: spec.Channel.CloseOk(),
        }

    @property
    def takes_more(self) -> bool:
        return self._prefetch == 0 or len(self._unacknowledged) < self._prefetch

    def handle(self, one: Any) -> bool:
        """Whether the channel is over."""
        if isinstance(one, frame.Method):
            answer = self._methods[type(one.method)](one.method)
            if answer is not None:
                self._connection.method(self._number, answer)
            return isinstance(answer, (spec.Channel.CloseOk, spec.Channel.Close))
        assert self._incoming is not None
        if isinstance(one, frame.Header):
            self._incoming = (self._incoming[0], one.properties, one.body_size)
            self._body = b""
        else:
            self._body += one.fragment
        asked, properties, size = self._incoming
        if properties is not None and len(self._body) >= size:
            self._incoming = None
            self._route(asked, Message(asked.exchange, asked.routing_key, properties, self._body))
        return False

    def deliver(self, queue: Queue, consumer: Consumer, message: Message) -> None:
        self._delivered += 1
        if not consumer.without_ack:
            self._unacknowledged[self._delivered] = (queue, message)
        self._content(
            spec.Basic.Deliver(
                consumer.tag, self._delivered, message.redelivered, message.exchange, message.key
            ),
            message,
        )

    def close(self) -> None:
        """Forget its consumers; what they had not acknowledged goes to others."""
        for queue in self._broker.queues.values():
            queue.consumers = deque(one for one in queue.consumers if one.channel is not self)
        self._settle(0, multiple=True, again=True)

    def _content(self, method: Any, message: Message) -> None:
        self._connection.method(self._number, method)
        self._connection.send(frame.Header(self._number, len(message.body), message.properties))
        for start in range(0, len(message.body), _ROOM):
            self._connection.send(frame.Body(self._number, message.body[start : start + _ROOM]))

    def _settle(self, tag: int, *, multiple: bool = False, again: bool = False) -> None:
        tags = [one for one in self._unacknowledged if one == tag or (multiple and (tag == 0 or one <= tag))]
        for one in sorted(tags, reverse=True):
            queue, message = self._unacknowledged.pop(one)
            if again:
                queue.ready.appendleft(replace(message, redelivered=True))
        for queue in self._broker.queues.values():
            queue.deliver()

    def _route(self, asked: spec.Basic.Publish, message: Message) -> None:
        queues = self._broker.queues_for(message.exchange, message.key)
        for queue in queues:
            queue.put(message)
        if not queues and asked.mandatory:
            self._content(spec.Basic.Return(312, "NO_ROUTE", message.exchange, message.key), message)
        if self._confirming:
            self._published += 1
            self._connection.method(self._number, spec.Basic.Ack(self._published))

    def _refuse(self, code: int, words: str) -> spec.Channel.Close:
        return spec.Channel.Close(code, words, 0, 0)

    def _declare_exchange(self, asked: spec.Exchange.Declare) -> Any:
        if asked.passive and asked.exchange not in self._broker.exchanges:
            return self._refuse(404, f"NOT_FOUND - no exchange {asked.exchange!r}")
        self._broker.exchanges.setdefault(asked.exchange, asked.type)
        return spec.Exchange.DeclareOk()

    def _declare_queue(self, asked: spec.Queue.Declare) -> Any:
        if asked.passive and asked.queue not in self._broker.queues:
            return self._refuse(404, f"NOT_FOUND - no queue {asked.queue!r}")
        queue = self._broker.queues.setdefault(asked.queue, Queue(asked.queue))
        return spec.Queue.DeclareOk(queue.name, len(queue.ready), len(queue.consumers))

    def _bind(self, asked: spec.Queue.Bind) -> Any:
        self._broker.bindings.add((asked.exchange, asked.routing_key, asked.queue))
        return spec.Queue.BindOk()

    def _purge(self, asked: spec.Queue.Purge) -> Any:
        queue = self._broker.queues[asked.queue]
        count = len(queue.ready)
        queue.ready.clear()
        return spec.Queue.PurgeOk(count)

    def _delete(self, asked: spec.Queue.Delete) -> Any:
        queue = self._broker.queues.pop(asked.queue, None)
        return spec.Queue.DeleteOk(len(queue.ready) if queue else 0)

    def _qos(self, asked: spec.Basic.Qos) -> Any:
        self._prefetch = asked.prefetch_count
        return spec.Basic.QosOk()

    def _consume(self, asked: spec.Basic.Consume) -> Any:
        queue = self._broker.queues.get(asked.queue)
        if queue is None:
            return self._refuse(404, f"NOT_FOUND - no queue {asked.queue!r}")
        if any(one.exclusive for one in queue.consumers) or (asked.exclusive and queue.consumers):
            return self._refuse(403, f"ACCESS_REFUSED - queue {asked.queue!r} in exclusive use")
        tag = asked.consumer_tag or f"consumer-{self._number}-{len(queue.consumers)}"
        self._connection.method(self._number, spec.Basic.ConsumeOk(tag))
        queue.consumers.append(Consumer(self, tag, asked.no_ack, asked.exclusive))
        queue.deliver()
        return None

    def _cancel(self, asked: spec.Basic.Cancel) -> Any:
        for queue in self._broker.queues.values():
            queue.consumers = deque(
                one for one in queue.consumers if (one.channel, one.tag) != (self, asked.consumer_tag)
            )
        return spec.Basic.CancelOk(asked.consumer_tag)

    def _publish(self, asked: spec.Basic.Publish) -> Any:
        if asked.exchange not in self._broker.exchanges:
            return self._refuse(404, f"NOT_FOUND - no exchange {asked.exchange!r}")
        self._incoming = (asked, None, 0)
        return None

    def _confirm(self, asked: spec.Confirm.Select) -> Any:  # noqa: ARG002 - nothing in it
        self._confirming = True
        return spec.Confirm.SelectOk()
