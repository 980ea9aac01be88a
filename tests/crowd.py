"""A crowd of clients on plain sockets: connections that stay, streams left at any event, halves of bodies, garbage."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from typing import Any

from serving import CHAT, COMPLETIONS

GARBAGE = (b"", b"{", b"[]", b"\xff\xfe\x00", b'{"prompt": "a"', b"null", b"[" * 200, b'"\xed\xa0\x80"')
WRONG: tuple[dict[str, Any], ...] = (
    {"temperature": 9}, {"max_tokens": 0}, {"prompt": ""}, {"prompt": [10**9]}, {"n": -1}, {"stop": 5},
    {"prompt": "a\ud800"}, {"tools": [{}]}, {"zzz": 1},
)  # fmt: skip


class Connection:
    """One connection, kept between requests as browsers and OpenAI's client do, and made anew where it was left."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._ends: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self, path: str, body: bytes, *, short: int = 0) -> asyncio.StreamReader:
        """A request, of whose body the last `short` bytes never come."""
        if self._ends is None:
            self._ends = await asyncio.open_connection("127.0.0.1", self._port, limit=2**20)
        reader, writer = self._ends
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body[: len(body) - short])
        await writer.drain()
        return reader

    async def head(self, reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
        """Status and headers of an answer."""
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        found = dict(line.lower().split(": ", 1) for line in lines)
        return int(first.split()[1]), found

    async def ask(self, path: str, body: bytes) -> tuple[int, Any]:
        """Status and object of an answer that is no stream."""
        reader = await self.send(path, body)
        status, headers = await self.head(reader)
        return status, json.loads(await reader.readexactly(int(headers["content-length"])))

    async def part(self, reader: asyncio.StreamReader) -> bytes:
        """The next part of a stream, empty at its end."""
        size = int(await reader.readline(), 16)
        return (await reader.readexactly(size + 2))[:-2]

    def leave(self) -> None:
        """Close it, at whatever stage it is."""
        if self._ends is not None:
            self._ends[1].transport.abort()
            self._ends = None


class Crowd:
    """Many requests of all kinds, `width` connections at once; every answer is held against what it has to be.

    Args:
        port: of the server.
        texts: what each prompt is continued with, greedily.
        chats: what each message of a user is answered with.
        tokens: of each.
        seed: of what is asked in which order.

    Attributes:
        found: requests by what became of them.
    """

    def __init__(
        self, port: int, texts: dict[str, str], chats: dict[str, str], tokens: int, seed: int = 0
    ) -> None:
        self.port, self.texts, self.chats, self.tokens = port, texts, chats, tokens
        self.found: Counter[str] = Counter()
        self._dice = random.Random(seed)

    async def ask(self, count: int, width: int) -> None:
        """So many requests more; returns once each has its end."""
        left = iter(range(count))

        async def client() -> None:
            connection = Connection(self.port)
            for _ in left:
                await asyncio.wait_for(self._one(connection), 300)
            connection.leave()

        async with asyncio.TaskGroup() as clients:
            for _ in range(width):
                clients.create_task(client())

    async def _one(self, connection: Connection) -> None:
        dice = self._dice
        kind, chat = dice.random(), dice.random() < 0.5
        path = CHAT if chat else COMPLETIONS
        prompt, text = dice.choice(list((self.chats if chat else self.texts).items()))
        body: dict[str, Any] = {"max_tokens": self.tokens, "temperature": 0}
        body |= {"messages": [{"role": "user", "content": prompt}]} if chat else {"prompt": prompt}
        if kind < 0.05:
            status, found = await connection.ask(path, dice.choice(GARBAGE))
            self._refused("garbage", status, found)
        elif kind < 0.1:
            wrong = {**body, **dice.choice(WRONG)}
            status, found = await connection.ask(path, json.dumps(wrong).encode())
            self._refused("wrong", status, found)
        elif kind < 0.15:
            data = json.dumps(body).encode()
            await connection.send(path, data, short=dice.randrange(1, len(data)))
            connection.leave()
            self.found["half a body"] += 1
        elif kind < 0.2:
            await connection.send(path, json.dumps(body).encode())
            await asyncio.sleep(dice.random() / 20)
            connection.leave()
            self.found["left before the answer"] += 1
        elif kind < 0.5:
            status, found = await connection.ask(path, json.dumps(body).encode())
            assert status == 200, found
            choice = found["choices"][0]
            assert (choice["message"]["content"] if chat else choice["text"]) == text, "a neighbour's"
            self.found["whole"] += 1
        else:
            leaves = dice.randrange(self.tokens) if kind < 0.7 else None
            await self._stream(connection, path, {**body, "stream": True}, text, leaves)

    async def _stream(
        self, connection: Connection, path: str, body: dict[str, Any], text: str, leaves: int | None
    ) -> None:
        """A stream read to its end, or left behind so many events."""
        reader = await connection.send(path, json.dumps(body).encode())
        status, _ = await connection.head(reader)
        assert status == 200
        made, events = "", 0
        while events != leaves and (part := await connection.part(reader)):
            events += 1
            if not part.startswith(b"data: [DONE]"):
                choice = json.loads(part.removeprefix(b"data: "))["choices"][0]
                made += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        assert text.startswith(made), "a neighbour's"
        if leaves is not None:
            connection.leave()
            self.found["streams left"] += 1
            return
        assert made == text, "a stream that lacks its end"
        self.found["streams"] += 1

    def _refused(self, kind: str, status: int, found: Any) -> None:
        assert status == 400 and found["error"]["type"] == "invalid_request_error", found
        self.found[kind] += 1
