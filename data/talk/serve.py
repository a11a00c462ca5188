"""DeepSeek's API over HTTP, and one page: what comes in is checked and bounded, the engine is handed in.

    pip install -r requirements-serve.txt
    python sample.py --serve
    curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "4-6+3*7="}]}'
"""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as HTTPRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from torch import Tensor

from data.io.cli import UserError
from data.talk.api import Answer, ChatRequest, Choice, error_body, read_request
from data.talk.engine import Busy, Engine, Request
from data.text.chat import chat_ids
from data.text.tokenizer import Tokenizer

BODY_BYTES = 1 << 20
PATIENCE = 30.0  # seconds for a client to send its request, or to take a part of the answer
KEEP_ALIVE = 10.0  # seconds without a token until a comment says that somebody is still there
MOST_CONNECTIONS = 1024
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PAGE = Path(__file__).with_name("page.html")
GUARD = {"Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
         "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
         "X-Content-Type-Options": "nosniff"}


@dataclass
class Service:
    """What is served: a model's name, its tokenizer, the engine, and how it is sampled from."""

    name: str
    tokenizer: Tokenizer
    engine: Engine
    draw_noise: Callable[..., Tensor]  # seed, num_samples, steps -> (num_samples, steps), uniform
    context: int  # most tokens of prompt and answer
    knobs: Any  # with those of sampling and of data/talk/knobs.py, and thinking

    def __post_init__(self):
        self.created, self.open = int(time.time()), 0

    @property
    def most_open(self) -> int:
        """Requests that are answered, wait, or are still being sent."""
        return self.knobs.queue + 2 * self.knobs.rows

    def card(self) -> dict:
        """The model as /models has it."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "plainseek"}

    async def models(self, _) -> Response:
        return JSONResponse({"object": "list", "data": [self.card()]})

    async def model(self, request: HTTPRequest) -> Response:
        self.check_model(request.path_params["name"])
        return JSONResponse(self.card())

    async def page(self, _) -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=GUARD)

    def check_model(self, name: str) -> None:
        if name not in ("", self.name):
            raise HTTPException(404, f"model: got {name[:60]!r}, this server has {self.name!r}")

    async def chat(self, request: HTTPRequest):
        """/chat/completions: the answer of one request, streamed or not."""
        if self.open >= self.most_open:
            raise Busy(f"{self.open} requests are open already: try again in a second")
        self.open += 1
        try:
            asked, messages = await run_in_threadpool(read_request, await read_body(request))
            self.check_model(asked.model)
            thinking = self.knobs.thinking if asked.thinking is None else asked.thinking
            prompt = await run_in_threadpool(chat_ids, self.tokenizer, messages, thinking)
            job = Job(self, asked, prompt)
        except BaseException:
            self.open -= 1
            raise
        if asked.stream:
            return Released(StreamingResponse(job.stream(), media_type="text/event-stream",
                                              headers={"Cache-Control": "no-cache"}), job.close)
        try:
            return await job.whole(request)
        finally:
            job.close()

    def run(self) -> None:
        """Serve until Ctrl-C. Raises UserError before anything is served."""
        host, port = self.knobs.host, self.knobs.port
        chat_ids(self.tokenizer, [{"role": "user", "content": "?"}], self.knobs.thinking)  # or it says why not
        with listen(host, port) as listening:
            shown = f"[{host}]" if ":" in host else host
            print(f"{self.name} at http://{shown}:{listening.getsockname()[1]} (API: /v1); Ctrl-C ends it", flush=True)
            settings = uvicorn.Config(build_app(self), log_level="warning", limit_concurrency=MOST_CONNECTIONS,
                                      timeout_graceful_shutdown=2, server_header=False)
            uvicorn.Server(settings).run(sockets=[listening])


class Job:
    """One request on its way through the engine; `close` frees what it still holds.

    Raises UserError for what does not fit, Busy when the queue is full.
    """

    def __init__(self, service: Service, asked: ChatRequest, prompt: list[int]):
        room = service.context - len(prompt)
        if room < 1:
            raise UserError(f"messages: got {len(prompt)} tokens, the context is {service.context} and has to "
                            "hold an answer too")
        knobs = service.knobs
        if asked.n > knobs.rows:
            raise UserError(f"n: got {asked.n}, wanted at most {knobs.rows}, what is decoded at once")
        steps = min(asked.max_tokens or room, room)
        temperature = knobs.temperature if asked.temperature is None else asked.temperature
        top_p = knobs.top_p if asked.top_p is None else asked.top_p
        self.service, self.asked, self.prompt, self.answer = service, asked, prompt, Answer(service.name)
        self.choices = [Choice(service.tokenizer, prompt, asked.stop) for _ in range(asked.n)]
        self.made: asyncio.Queue = asyncio.Queue()  # of what the engine tells, or of its error
        loop = asyncio.get_running_loop()

        def tell(*news) -> None:  # the engine's thread calls it
            with suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(self.made.put_nowait, news[0] if len(news) == 1 else news)

        self.request = Request(prompt, len(prompt) + steps, (temperature, knobs.top_k, top_p),
                               service.draw_noise(asked.seed, num_samples=asked.n, steps=steps), tell, tell)
        service.engine.submit(self.request)

    def close(self) -> None:
        """Free the rows that are still being decoded."""
        self.service.engine.cancel(self.request)
        self.service.open -= 1

    async def deltas(self) -> AsyncIterator[tuple[int, dict] | None]:
        """What each answer gains, as it is made; None where nothing came for a while."""
        while any(choice.finish_reason is None for choice in self.choices):
            try:
                news = await asyncio.wait_for(self.made.get(), KEEP_ALIVE)
            except (TimeoutError, asyncio.TimeoutError):  # one class since Python 3.11
                yield None
                continue
            if isinstance(news, Exception):  # whatever its class, the request is not to blame
                raise HTTPException(500, f"the engine failed: {news}") from news
            index, tokens, has_ended = news
            if self.choices[index].finish_reason is None:
                yield index, self.choices[index].add(tokens, has_ended)

    async def whole(self, request: HTTPRequest) -> Response:
        """The answer that is not streamed; nothing when the client has gone."""
        async def finish() -> None:
            async for _ in self.deltas():
                pass

        async def leave() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        work, gone = asyncio.ensure_future(finish()), asyncio.ensure_future(leave())
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return Response(status_code=499)  # nobody reads it
            work.result()
            return JSONResponse(self.answer.whole(self.prompt, self.choices))
        finally:
            work.cancel()
            gone.cancel()

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events, `data: [DONE]` the last."""
        for index in range(len(self.choices)):
            yield event(self.answer.chunk(index, {"role": "assistant", "content": ""}))
        try:
            async for news in self.deltas():
                if news is None:
                    yield ": keep-alive\n\n"
                    continue
                index, delta = news
                reason = self.choices[index].finish_reason
                if delta or reason:
                    yield event(self.answer.chunk(index, delta, reason))
            if self.asked.include_usage:
                yield event(self.answer.last_chunk(self.prompt, self.choices))
        except HTTPException as error:  # the head is sent: an event has to say it
            yield event(error_body(error.status_code, error.detail))
        yield "data: [DONE]\n\n"


def event(value: dict) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class Released:
    """A response, and what is called when it is over, however it ends."""

    def __init__(self, response: Response, close: Callable[[], None]):
        self.response, self.close = response, close

    async def __call__(self, scope, receive, send) -> None:
        try:
            await self.response(scope, receive, send)
        finally:
            self.close()


async def read_body(request: HTTPRequest) -> bytes:
    """The body, within BODY_BYTES and PATIENCE. Raises HTTPException."""
    async def read() -> bytes:
        parts, length = [], 0
        async for part in request.stream():
            length += len(part)
            if length > BODY_BYTES:
                raise HTTPException(413, f"body: got more than {BODY_BYTES} bytes", {"Connection": "close"})
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), PATIENCE)
    except (TimeoutError, asyncio.TimeoutError):
        raise HTTPException(408, f"body: did not come within {PATIENCE:g} s", {"Connection": "close"}) from None


class Guard:
    """In front of all: pages of other sites may not ask, and no client is waited for without end."""

    def __init__(self, app, is_loopback: bool):
        self.app, self.is_loopback = app, is_loopback

    async def __call__(self, scope, receive, send) -> None:
        async def hurried(message) -> None:
            await asyncio.wait_for(send(message), PATIENCE)

        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        is_ours = not self.is_loopback or hostname(f"//{host}") in LOOPBACK
        if origin is not None:
            is_ours = is_ours and origin.partition("//")[2] == host
        if is_ours:
            await self.app(scope, receive, hurried)
        else:
            refusal = JSONResponse(error_body(403, "this server answers no other site's pages"), 403)
            await refusal(scope, receive, hurried)


def hostname(url: str) -> str | None:
    """The host of a URL; None when it has none."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


async def on_error(_, error: Exception) -> Response:
    """Any error in the API's form."""
    if isinstance(error, HTTPException):
        code = "model_not_found" if error.status_code == 404 and error.detail.startswith("model:") else None
        return JSONResponse(error_body(error.status_code, error.detail, code), error.status_code, error.headers)
    if isinstance(error, Busy):
        return JSONResponse(error_body(429, str(error), "queue_full"), 429, {"Retry-After": "1"})
    if isinstance(error, UserError):
        is_long = str(error).startswith("messages: got")
        return JSONResponse(error_body(400, str(error), "context_length_exceeded" if is_long else None), 400)
    return JSONResponse(error_body(500, f"internal error: {type(error).__name__}"), 500)


def build_app(service: Service):
    """The ASGI application of a service, whose engine ends with it."""
    @asynccontextmanager
    async def lifespan(_):
        yield
        await run_in_threadpool(service.engine.close)

    routes = [Route("/", service.page)]
    for prefix in ("", "/v1"):  # DeepSeek's clients use both
        routes += [Route(f"{prefix}/models", service.models), Route(f"{prefix}/models/{{name:path}}", service.model),
                   Route(f"{prefix}/chat/completions", service.chat, methods=["POST"])]
    handlers = {HTTPException: on_error, UserError: on_error, Exception: on_error}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    return Guard(app, service.knobs.host in LOOPBACK)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises UserError when the port is taken or the host is not this machine's."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=MOST_CONNECTIONS)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise UserError(f"host {host}, port {port}: cannot listen there ({reason}): --port gives another "
                        "port") from None
