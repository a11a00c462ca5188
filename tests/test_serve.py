"""The API as the openai client and rude clients find it: a real server on a port of this machine."""

import asyncio
import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from data.io.cli import UserError
from data.talk.api import Choice, read_request
from data.talk.engine import Engine
from data.text.chat import chat_ids
from model import Config, Transformer
from sample import Decoder, SampleConfig, draw_noise, generate, main
from tests.test_chat import SIZES, TOKENIZER

uvicorn, openai = pytest.importorskip("uvicorn"), pytest.importorskip("openai")
pytest.importorskip("starlette")

from data.talk import serve  # noqa: E402, it wants both

ROWS, WIDTH = 8, 128


class Scripted:
    """A decoder that says one text in every row, a token a step; it counts the rows that it holds."""

    def __init__(self, text: str, pause: float = 0.0):
        self.script, self.pause, self.batch, self.news = TOKENIZER.encode_trusted(text), pause, {}, []
        self.script.append(TOKENIZER.eos_id)
        self.most = 0

    def admit(self, prompts, rows, limits, noise, *sampling):
        assert not set(rows) & set(self.batch)
        for i, (row, limit) in enumerate(zip(rows, limits)):
            self.batch[row] = [0, limit - len(prompts[i * len(prompts) // len(rows)])]
            self.say(row)
        self.most = max(self.most, len(self.batch))

    def step(self):
        time.sleep(self.pause)
        for row in self.batch:
            self.say(row)

    def say(self, row):
        place, limit = self.batch[row]
        self.batch[row][0] += 1
        self.news.append((row, [self.script[place]], place + 1 in (len(self.script), limit)))

    def look(self):
        news, self.news = self.news, []
        for row, _, has_ended in news:
            if has_ended:
                del self.batch[row]
        return news

    def drop(self, rows):
        self.batch = {row: state for row, state in self.batch.items() if row not in rows}


@contextmanager
def serving(decoder, **knobs):
    """A server around a decoder: its service, and the port that it listens at."""
    knobs = SampleConfig(serve=True, **{"rows": ROWS, "queue": 4} | knobs)
    engine = Engine(decoder, knobs.rows, knobs.queue)
    service = serve.Service("any", TOKENIZER, engine, partial(draw_noise, prompts=1), WIDTH, knobs)
    server = uvicorn.Server(uvicorn.Config(serve.build_app(service), log_level="error", timeout_graceful_shutdown=1))
    with serve.listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield service, listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
    assert not thread.is_alive() and not engine.thread.is_alive()


def client_of(port: int, **options):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", **{"max_retries": 0} | options)


def post(port: int, body, path: str = "/v1/chat/completions", **headers):
    """Status, headers and JSON of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body), headers)
    answer = connection.getresponse()
    return answer.status, dict(answer.headers), json.loads(answer.read())


def ask(client, text: str = "4-6+3*7=", **options):
    return client.chat.completions.create(model="any", messages=[{"role": "user", "content": text}], **options)


def settle(service, decoder) -> None:
    """Wait until all that was asked is over, and see that every row is free."""
    deadline = time.monotonic() + 20
    while service.open or service.engine.owners or service.engine.waiting:
        assert time.monotonic() < deadline, (service.open, service.engine.owners)
        time.sleep(0.01)
    assert sorted(service.engine.free) == list(range(service.knobs.rows))
    assert not decoder.batch


@pytest.fixture(scope="module")
def thinker():
    decoder = Scripted("<think>4-6=8;8+3=1;1*7=7</think><answer>7, I say 漢</answer>")
    with serving(decoder) as (service, port):
        yield SimpleNamespace(decoder=decoder, service=service, port=port, client=client_of(port))
        settle(service, decoder)


def test_an_answer_as_deepseek_gives_it(thinker):
    made = ask(thinker.client)
    message, usage = made.choices[0].message, made.usage
    assert (message.content, message.reasoning_content) == ("7, I say 漢", "4-6=8;8+3=1;1*7=7")
    assert message.role == "assistant" and made.choices[0].finish_reason == "stop" and made.object == "chat.completion"
    thought = len(TOKENIZER.encode_trusted("<think>4-6=8;8+3=1;1*7=7</think>"))
    assert usage.completion_tokens_details.reasoning_tokens == thought
    assert usage.completion_tokens == len(thinker.decoder.script)
    assert usage.prompt_tokens == len(chat_ids(TOKENIZER, [{"role": "user", "content": "4-6+3*7="}]))


def test_a_stream_gives_the_same(thinker):
    thought = said = ""
    reasons, usages = [], []
    for event in ask(thinker.client, stream=True, stream_options={"include_usage": True}):
        usages.append(event.usage)
        for choice in event.choices:
            thought += getattr(choice.delta, "reasoning_content", None) or ""
            said += choice.delta.content or ""
            reasons.append(choice.finish_reason)
    assert (said, thought) == ("7, I say 漢", "4-6=8;8+3=1;1*7=7")
    assert [reason for reason in reasons if reason] == ["stop"] == reasons[-1:]
    assert usages[-1] == ask(thinker.client).usage and not any(usages[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_end_what_is_said_and_are_no_part_of_it(thinker, stream):
    """Also where one begins in a token and ends in another; a thought has none."""
    made = ask(thinker.client, stop=["I s", "8;"], stream=stream)
    if stream:
        said = "".join(event.choices[0].delta.content or "" for event in made)
    else:
        said = made.choices[0].message.content
        assert made.choices[0].finish_reason == "stop" and "8;" in made.choices[0].message.reasoning_content
    assert said == "7, "
    settle(thinker.service, thinker.decoder)


def test_several_answers_and_a_limit(thinker):
    made = ask(thinker.client, n=4, max_tokens=9)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in made.choices} == {"length"} and made.usage.completion_tokens == 36


def test_models(thinker):
    assert [model.id for model in thinker.client.models.list()] == ["any"]
    assert thinker.client.models.retrieve("any").owned_by == "plainseek"
    with pytest.raises(openai.NotFoundError):
        thinker.client.models.retrieve("gpt-4")


WRONG = {
    "temperature": [-1, 2.5, "hot", True, 10**400], "top_p": [0, 1.5], "max_tokens": [0, -1, 1.5, "x"], "n": [0, 99, "2"],
    "stop": ["", ["a"] * 17, [1], {}], "seed": ["x", 10**30], "stream": ["yes"], "messages": [
        None, [], "hi", [1], [{}], [{"role": "wizard", "content": "x"}], [{"role": "user"}], [{"role": ["user"]}],
        [{"role": "user", "content": 5}], [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "user", "content": "1+" * 300}]],
    "tools": [[{"type": "function"}]], "temprature": [1], "stream_options": [3], "thinking": ["on", {"type": []}],
    "response_format": [{"type": "json_object"}], "model": [5],
}


@pytest.mark.parametrize("name,value", [(name, value) for name, values in WRONG.items() for value in values],
                         ids=lambda value: str(value)[:30])
def test_wrong_parameters_are_told_in_the_form_of_the_api(thinker, name, value):
    body = {"messages": [{"role": "user", "content": "1+1="}]} | {name: value}
    status, _, answer = post(thinker.port, body)
    error = answer["error"]
    assert status == 400 and set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 300
    assert error["type"] == "invalid_request_error"
    told = {"temprature": None, "stream_options": "include_usage"}.get(name, name)
    assert error["param"] and error["param"].replace("[", ".").split(".")[0] == told or error["param"] is told


def test_too_long_has_its_code(thinker):
    with pytest.raises(openai.BadRequestError) as error:
        ask(thinker.client, "1+" * 100)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as error:
        thinker.client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000, b'{"a":' * 5000,
                                  b"9" * 10_000, b'"' + b"x" * 500_000], ids=range(9))
def test_bodies_that_are_no_request(thinker, body):
    status, _, answer = post(thinker.port, body)
    assert status == 400 and answer["error"]["message"]


def test_bodies_and_heads_that_are_too_large(thinker):
    assert post(thinker.port, b"x" * (serve.BODY_BYTES + 1))[0] == 413
    with socket.create_connection(("127.0.0.1", thinker.port), timeout=30) as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nx: " + b"a" * 200_000)
        assert b" 400 " in raw.recv(4096)


def test_other_paths_methods_hosts_and_sites(thinker):
    def get(path: str, method: str = "GET", **headers) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", thinker.port, timeout=30)
        connection.putrequest(method, path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.read()

    status, page = get("/")
    assert status == 200 and b"<title>plainseek</title>" in page
    for path in ("/../../etc/passwd", "/%2e%2e/sample.py", "//etc/passwd", "/page.html", "/data/talk/serve.py", "/v1/"):
        status, body = get(path)
        assert status == 404 and json.loads(body)["error"]["type"] == "not_found_error", path
    assert get("/v1/models/../../etc/passwd")[0] == 404
    status, body = get("/v1/chat/completions")
    assert status == 405 and json.loads(body)["error"]
    assert get("/v1/models", Host="evil.example")[0] == 403
    assert get("/v1/models", Origin="http://evil.example")[0] == 403
    assert get("/v1/models", Origin=f"http://127.0.0.1:{thinker.port}")[0] == 200


def test_special_tokens_that_a_user_types_stay_text():
    body = json.dumps({"messages": [{"role": "user", "content": "<｜end▁of▁sentence｜>\ud800"}]}).encode()
    _, messages = read_request(body)
    ids = chat_ids(TOKENIZER, messages)
    assert TOKENIZER.eos_id not in ids and TOKENIZER.decode(ids).count("<｜end▁of▁sentence｜>?") == 1


def test_a_choice_holds_back_what_may_become_a_stop_string():
    choice = Choice(TOKENIZER, [], ["abc"])
    parts = [choice.add(TOKENIZER.encode(text), False).get("content", "") for text in ("xa", "b", "a", "b", "d")]
    assert parts == ["x", "", "ab", "", "abd"]


@pytest.mark.parametrize("draft", [0, 2])
def test_the_engine_says_what_generate_says(draft):
    """Real rows of a real model, that join and leave at any time: the same tokens as each request alone."""
    torch.manual_seed(3)
    model = Transformer(Config.preset("tiny", **SIZES, num_nextn_predict_layers=min(draft, 1))).eval()
    questions = [f"{i}+{i * i}=" for i in range(8)]
    options = [dict(seed=i, n=1 + i % 3, temperature=(0, 1, 1.5)[i % 3], top_p=(1, 0.9)[i % 2], max_tokens=3 + 2 * i)
               for i in range(8)]
    decoder = Decoder(model, ROWS, WIDTH, TOKENIZER.stop_ids, draft=draft)
    with serving(decoder, queue=20) as (service, port), ThreadPoolExecutor(12) as pool:
        client = client_of(port)
        made = list(pool.map(lambda text, how: ask(client, text, **how), questions, options))
        settle(service, decoder)
    for text, how, answer in zip(questions, options, made):
        prompt = chat_ids(TOKENIZER, [{"role": "user", "content": text}])
        wanted = generate(model, [prompt], num_samples=how["n"], max_new_tokens=how["max_tokens"], seed=how["seed"],
                          temperature=how["temperature"], top_p=how["top_p"], stop_ids=TOKENIZER.stop_ids)
        for row, choice in enumerate(answer.choices):
            whole = Choice(TOKENIZER, prompt, [])
            whole.add(wanted.completion(row), True)
            assert choice.message.content == whole.message()["content"]
        assert answer.usage.completion_tokens == int(wanted.mask.sum())


def test_fifty_at_once_are_answered_or_told_to_come_again():
    decoder = Scripted("<think>1</think><answer>2</answer>", pause=0.01)
    with serving(decoder) as (service, port), ThreadPoolExecutor(50) as pool:
        found = list(pool.map(lambda _: post(port, {"messages": [{"role": "user", "content": "x"}]}), range(50)))
        answered = [answer["choices"][0]["message"]["content"] for status, _, answer in found if status == 200]
        busy = [(headers, answer) for status, headers, answer in found if status == 429]
        assert answered == ["2"] * len(answered) and len(answered) >= ROWS + 4 and len(answered) + len(busy) == 50
        assert all({k.lower(): v for k, v in headers.items()}["retry-after"] == "1" for headers, _ in busy)
        assert all(answer["error"]["type"] == "rate_limit_error" for _, answer in busy) and busy
        assert 1 < decoder.most <= ROWS
        patient = client_of(port, max_retries=50)  # the client itself tries again
        assert [ask(patient).choices[0].message.content for _ in range(3)] == ["2"] * 3
        settle(service, decoder)


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_hang_up_free_their_rows(stream):
    decoder = Scripted("x" * 110, pause=0.05)
    with serving(decoder) as (service, port):
        body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": stream}).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body)
        raw = [socket.create_connection(("127.0.0.1", port)) for _ in range(10)]
        for one in raw:
            one.sendall(head + body)
        deadline = time.monotonic() + 20
        while len(decoder.batch) < ROWS or service.open < 10:  # the others wait
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for one in raw:
            one.close()
        started = time.monotonic()
        settle(service, decoder)
        assert time.monotonic() - started < 2  # the whole text would take 3


@pytest.mark.parametrize("error", [ZeroDivisionError("by zero"), UserError("logits: not finite")], ids=repr)
@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_engine_tells_those_who_wait_and_goes_on(error, stream, capfd):
    """The fault is the server's, whatever it is: 500, or an event; who serves sees a traceback."""
    def fail():
        raise error

    decoder = Scripted("xy" * 20, pause=0.01)
    with serving(decoder) as (service, port):
        real, decoder.step = decoder.step, fail
        with pytest.raises(openai.APIError) as found:
            list(ask(client_of(port), stream=stream))
        assert found.value.body["type"] == "server_error" and str(error) in found.value.body["message"]
        assert stream or found.value.status_code == 500
        decoder.step, decoder.batch, decoder.news = real, {}, []
        assert ask(client_of(port)).choices[0].message.content == "xy" * 20
        settle(service, decoder)
    assert capfd.readouterr().err.count(f"{type(error).__name__}: {error}") == 1


def test_a_slow_body(monkeypatch):
    monkeypatch.setattr(serve, "PATIENCE", 0.3)
    with serving(Scripted("x")) as (service, port):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
            assert b" 408 " in raw.recv(4096)
        settle(service, service.engine.decoder)


def test_a_port_in_use_is_one_line_before_weights_are_read():
    with serve.listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match="cannot listen"):
        main(["--serve", "--port", str(taken.getsockname()[1]), "--checkpoint", "nowhere"])
    with pytest.raises(UserError, match="cannot listen"):
        serve.listen("203.0.113.1", 0)


def test_a_client_that_does_not_read_is_left(monkeypatch):
    """Its part of the answer is never taken: the request ends, and what it held is freed."""
    monkeypatch.setattr(serve, "PATIENCE", 0.1)
    freed = []

    async def parts():
        yield "a part"

    async def never(*_):
        await asyncio.sleep(60)

    answer = serve.Released(serve.StreamingResponse(parts()), lambda: freed.append(True))
    scope = {"type": "http", "headers": [(b"host", b"localhost")], "asgi": {"spec_version": "2.3"}}
    with pytest.raises(BaseException) as error:
        asyncio.run(serve.Guard(answer, True)(scope, never, never))
    assert freed and "TimeoutError" in repr(error.value)
