"""What the API costs: tokens per second of one client and of many at once, and what the engine alone makes.

    pip install -r requirements-serve.txt
    python -m tests.bench.serve --checkpoint out/rl --clients 16

A server of its own on this machine; each client asks in turn `requests` times, with seeds of its own, streamed or not.
One client and many take turns, `rounds` times, and the best round of each counts.
"""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection

import uvicorn

from data.io.cli import knob, parse_flags, run_main
from data.talk import serve
from sample import SampleConfig, load, service_of


@dataclass
class BenchConfig(SampleConfig):
    """The knobs of sample.py, and how it is asked."""

    serve: bool = knob(True, "what is measured")
    question: str = knob("4-6+3*7=", "what each client asks")
    clients: int = knob(16, "at once", least=2)
    requests: int = knob(8, "of each client, one behind the other", least=1)
    rounds: int = knob(3, "of one client and of many, in turn", least=1)
    tokens: int = knob(64, "most tokens of an answer", least=1)
    stream: bool = knob(True, "token by token")


def ask(port: int, knobs: BenchConfig, seed: int) -> int:
    """Ask once; how many tokens came."""
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"messages": [{"role": "user", "content": knobs.question}], "seed": seed, "max_tokens": knobs.tokens,
            "stream": knobs.stream, "stream_options": {"include_usage": True}}
    connection.request("POST", "/v1/chat/completions", json.dumps(body))
    text = connection.getresponse().read().decode()
    last = text.strip().split("\n\n")[-2].removeprefix("data: ") if knobs.stream else text
    return json.loads(last)["usage"]["completion_tokens"]


def rate(port: int, knobs: BenchConfig, clients: int) -> float:
    """Tokens per second of so many clients."""
    def client(number: int) -> int:
        return sum(ask(port, knobs, 1000 * number + i) for i in range(knobs.requests))

    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        made = sum(pool.map(client, range(clients)))
    return made / (time.perf_counter() - started)


def main(argv: list[str]) -> None:
    """Serve, ask, print."""
    knobs = parse_flags(BenchConfig, argv, __doc__)
    directory, model, tokenizer, _ = load(knobs)
    app = serve.build_app(service_of(knobs, directory, model, tokenizer))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with serve.listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        ask(port, knobs, 0)  # whatever is slow for the first time
        rates = [(rate(port, knobs, 1), rate(port, knobs, knobs.clients)) for _ in range(knobs.rounds)]
        server.should_exit = True
        thread.join()
    one, many = map(max, zip(*rates))
    for clients, best, each in ((1, one, 0), (knobs.clients, many, 1)):
        rounds = ", ".join(f"{pair[each]:,.0f}" for pair in rates)
        print(f"{clients:4} clients  {best:8,.0f} tokens/s  (rounds: {rounds})")
    print(f"{many / one:.1f} times as many")


if __name__ == "__main__":
    run_main(main)
