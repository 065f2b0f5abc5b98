"""The gateway in front of the real server and engine, with OpenAI's own client and with hostile HTTP."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from served_process import ServedProcess, wait_for

from apar.runtime.chat import render_prompt
from apar.runtime.llm import LLM
from apar.runtime.outputs import RequestOutput
from apar.runtime.sampling_params import SamplingParams
from apar.runtime.tokenizer import Tokenizer

PROMPTS = ["Give me four facts about owls.", "Tell me about the violin.", "Give me five tips for growing tomatoes."]
MAX_TOKENS = 160
ENDLESS = {"max_tokens": 900, "extra_body": {"ignore_eos": True, "fork": False}}


def user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def service(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedProcess]:
    """One service for this file, with every model and Triton's own ports."""
    ports = [f"--triton-{name}-port=0" for name in ("grpc", "http", "metrics")]
    with ServedProcess(
        tiny_engine, tmp_path_factory.mktemp("service"), "--triton-address", "127.0.0.1", *ports
    ) as service:
        yield service


@pytest.fixture(scope="module")
def strict(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedProcess]:
    """One with narrow limits and keys."""
    folder = tmp_path_factory.mktemp("strict")
    (folder / "keys").write_text("first-key\nsecond-key\n", encoding="utf-8-sig")  # as some editors do
    limits = ["--max-requests", "8", "--max-body-mb", "0.01", "--deadline", "30"]
    with ServedProcess(tiny_engine, folder, "--api-key-file", str(folder / "keys"), *limits) as service:
        yield service


@pytest.fixture(scope="module")
def expected(tiny_engine: Path) -> dict[str, RequestOutput]:
    """What `apar generate` answers, greedy."""
    with LLM(tiny_engine, threads=1) as llm:
        answers = llm.generate(PROMPTS, SamplingParams(max_tokens=MAX_TOKENS))
    return dict(zip(PROMPTS, answers, strict=True))


@pytest.fixture
def client(service: ServedProcess) -> Iterator[openai.OpenAI]:
    with service.client() as client:
        yield client


def quiet(service: ServedProcess) -> bool:
    """Whether the engine has nothing to do and every block is free, by numbers of after the call."""
    asked = time.time()
    assert wait_for(lambda: service.metric("apar:numbers_timestamp_seconds") > asked)
    return service.metric("apar:num_requests_running") + service.metric("apar:kv_blocks_used") == 0


def cancelled(service: ServedProcess) -> float:
    """Requests that the engine was told to end because nobody waits for them."""
    return service.metric("apar:request_errors_total", 'code="cancelled"')


class TestAnswers:
    @pytest.mark.parametrize("prompt", PROMPTS)
    def test_same_text_as_generate(
        self, prompt: str, client: openai.OpenAI, expected: dict[str, RequestOutput]
    ) -> None:
        wanted = expected[prompt]
        whole = client.chat.completions.create(model="tiny", messages=user(prompt), max_tokens=MAX_TOKENS)
        assert whole.choices[0].message.content == wanted.text
        assert whole.choices[0].finish_reason == {"stop": "stop", "length": "length"}[wanted.finish_reason]
        assert whole.usage is not None
        assert whole.usage.completion_tokens == wanted.usage.completion_tokens
        assert whole.usage.prompt_tokens == wanted.usage.prompt_tokens
        chunks = list(
            client.chat.completions.create(
                model="tiny",
                messages=user(prompt),
                max_tokens=MAX_TOKENS,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == wanted.text
        assert len(chunks) >= 4, "role, text, end and usage; what comes together is one chunk"
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-1].usage == whole.usage.model_copy(
            update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
        )  # type: ignore[union-attr]
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason

    def test_thirty_two_in_flight(self, service: ServedProcess, expected: dict[str, RequestOutput]) -> None:
        async def ask(client: openai.AsyncOpenAI, prompt: str, stream: bool) -> str:
            fields: dict[str, Any] = {"model": "tiny", "messages": user(prompt), "max_tokens": MAX_TOKENS}
            if not stream:
                return (await client.chat.completions.create(**fields)).choices[0].message.content or ""
            parts = [
                c.choices[0].delta.content or ""
                async for c in await client.chat.completions.create(**fields, stream=True)
            ]
            return "".join(parts)

        async def run() -> list[str]:
            async with openai.AsyncOpenAI(base_url=service.urls["openai"], api_key="x", max_retries=0) as client:
                return await asyncio.gather(*(ask(client, PROMPTS[i % 3], i % 2 == 0) for i in range(32)))

        assert asyncio.run(run()) == [expected[PROMPTS[i % 3]].text for i in range(32)]
        assert wait_for(lambda: quiet(service))

    def test_branches_are_told_as_they_grow(self, client: openai.OpenAI, expected: dict[str, RequestOutput]) -> None:
        wanted = expected[PROMPTS[0]]
        assert len(wanted.branches) > 2
        segments: dict[int, list[str]] = {0: [""]}
        parents: dict[int, int] = {}
        first_fork = text_before = None
        text = ""
        asked: dict[str, Any] = {"model": "tiny", "messages": user(PROMPTS[0]), "max_tokens": MAX_TOKENS}
        for chunk in client.chat.completions.create(**asked, stream=True, extra_body={"branch_events": True}):
            choice: Any = chunk.choices[0]
            text += choice.delta.content or ""
            for event in (getattr(choice, "apar", None) or {}).get("events", []):
                branch = event["branch_id"]
                if event["event"] == "fork":
                    first_fork, text_before = first_fork or branch, text_before or text
                    parents[branch] = event["parent_id"]
                    segments[event["parent_id"]].append("")
                    segments[branch] = [""]
                elif event["event"] == "delta":
                    segments[branch][-1] += event["text"]
        assert segments == {b.branch_id: b.segments for b in wanted.branches}
        assert parents == {b.branch_id: b.parent_id for b in wanted.branches if b.parent_id is not None}
        assert text_before is not None and len(text_before) < len(wanted.text) / 2
        whole: Any = client.chat.completions.create(**asked, extra_body={"branch_events": True}).choices[0]
        assert {b["branch_id"]: b["segments"] for b in whole.apar["branch_tree"]} == segments
        assert whole.apar["branches"] == len(segments) and whole.apar["steps"] == wanted.timing.steps

    def test_plain_decoding_and_branch_limits(self, client: openai.OpenAI) -> None:
        def branches(**fields: Any) -> int:
            answer = client.chat.completions.create(
                model="tiny", messages=user(PROMPTS[0]), max_tokens=MAX_TOKENS, extra_body=fields
            )
            choice: Any = answer.choices[0]
            return int(choice.apar["branches"])

        assert branches(fork=False) == 1
        assert branches(max_depth=1) == 1
        assert branches() > 2

    def test_log_probabilities(self, client: openai.OpenAI, expected: dict[str, RequestOutput]) -> None:
        wanted = expected[PROMPTS[0]]
        asked: dict[str, Any] = {"model": "tiny", "messages": user(PROMPTS[0]), "max_tokens": MAX_TOKENS}
        asked |= {"logprobs": True, "top_logprobs": 2}
        whole = client.chat.completions.create(**asked).choices[0].logprobs
        assert whole is not None and whole.content is not None
        for token in whole.content:
            assert token.logprob <= 0 and len(token.top_logprobs) == 2
            assert token.logprob == token.top_logprobs[0].logprob, "greedy"
        # Blanks and newlines around details are put there by the runtime, all else is tokens.
        squeezed = "".join("".join(token.token for token in whole.content).split())
        assert squeezed == "".join(wanted.text.split())
        streamed = [
            token
            for chunk in client.chat.completions.create(**asked, stream=True)
            if chunk.choices[0].logprobs
            for token in chunk.choices[0].logprobs.content or []
        ]
        assert [t.token for t in streamed] == [t.token for t in whole.content]
        assert all(
            math.isclose(a.logprob, b.logprob, abs_tol=1e-3) for a, b in zip(streamed, whole.content, strict=True)
        )

    def test_seed_and_stop(self, client: openai.OpenAI) -> None:
        def say(**fields: Any) -> str:
            answer = client.chat.completions.create(model="tiny", messages=user(PROMPTS[1]), max_tokens=40, **fields)
            return answer.choices[0].message.content or ""

        hot = {"temperature": 2.0}
        assert say(**hot, seed=7) == say(**hot, seed=7) != say(**hot, seed=8)
        plain = say(extra_body={"fork": False})
        word = plain.split()[3]
        assert say(stop=word, extra_body={"fork": False}) == plain[: plain.index(word)]

    def test_several_answers(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(
            model="tiny", messages=user(PROMPTS[1]), n=3, temperature=2.0, seed=1, max_tokens=40
        )
        texts = [choice.message.content for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) > 1
        assert answer.usage is not None and answer.usage.prompt_tokens < 60
        collected = {0: "", 1: "", 2: ""}
        for chunk in client.chat.completions.create(
            model="tiny", messages=user(PROMPTS[1]), n=3, temperature=2.0, seed=1, max_tokens=40, stream=True
        ):
            collected[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert list(collected.values()) == texts

    def test_completions(self, client: openai.OpenAI, tiny_engine: Path) -> None:
        with LLM(tiny_engine, threads=1) as llm:
            wanted = [
                a.text for a in llm.generate(["Owls are", "The violin"], SamplingParams(max_tokens=16), chat=False)
            ]
        answer = client.completions.create(model="tiny", prompt=["Owls are", "The violin"])
        assert [choice.text for choice in answer.choices] == wanted
        assert all(choice.finish_reason == "length" for choice in answer.choices)
        prompt = render_prompt("Owls are", Tokenizer.load(tiny_engine))
        assert client.completions.create(model="tiny", prompt=prompt).choices[0].text == wanted[0]
        with pytest.raises(openai.BadRequestError, match="vocabulary"):
            client.completions.create(model="tiny", prompt=[10**6])
        echoed = client.completions.create(model="tiny", prompt="Owls are", echo=True)
        assert echoed.choices[0].text == "Owls are" + wanted[0]
        logprobs = (
            client.completions.create(model="tiny", prompt="Owls are", logprobs=2, max_tokens=5).choices[0].logprobs
        )
        assert logprobs is not None and logprobs.tokens and logprobs.text_offset and logprobs.top_logprobs
        assert len(logprobs.tokens) == len(logprobs.text_offset) == 5
        assert (
            "".join(
                chunk.choices[0].text
                for chunk in client.completions.create(model="tiny", prompt="Owls are", stream=True)
            )
            == wanted[0]
        )

    def test_models(self, client: openai.OpenAI) -> None:
        (model,) = client.models.list().data
        assert model.id == "tiny" and client.models.retrieve("tiny") == model
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4o")


class TestErrors:
    def test_openai_clients_get_their_exceptions(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-4o", messages=user("hi"))
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="tiny", prompt="owl " * 3000)
        assert long.value.code == "context_length_exceeded" and "1024" in str(long.value)
        for messages in ([], [{"role": "assistant", "content": "hi"}]):
            with pytest.raises(openai.BadRequestError) as refused:
                client.chat.completions.create(model="tiny", messages=messages)
            assert refused.value.type == "invalid_request_error"
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt="")

    def test_errors_of_a_stream_come_as_status(self, client: openai.OpenAI) -> None:
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt="owl " * 3000, stream=True)

    def test_control_strings_are_text(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.create(model="tiny", messages=user("[Fork] </s> [Child] owls?"), max_tokens=8)
        assert answer.choices[0].message.content

    def test_request_ids(self, client: openai.OpenAI) -> None:
        def request_id(given: str) -> str:
            answer = client.completions.with_raw_response.create(
                model="tiny", prompt="a", max_tokens=1, extra_headers={"X-Request-Id": given}
            )
            return answer.headers["X-Request-Id"]

        assert request_id("mine-1") == "mine-1"
        assert len(request_id("not ok!")) == 32


class TestCancellation:
    def test_a_client_that_goes_away_frees_its_blocks(self, service: ServedProcess) -> None:
        for stream in (True, False):
            before = cancelled(service)
            taken = service.metric("nv_inference_request_success")
            body = {"model": "tiny", "messages": user("Say something."), "max_tokens": 900, "ignore_eos": True}
            body |= {"stream": stream, "fork": False, "n": 16}
            connection = http.client.HTTPConnection(*service.address)
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            if stream:
                connection.getresponse().read(300)
            assert wait_for(lambda: service.metric("nv_inference_request_success") >= taken + 16)  # noqa: B023
            assert connection.sock is not None
            connection.sock.close()
            connection.close()
            assert wait_for(lambda: cancelled(service) > before), "they ran to their ends"  # noqa: B023
            assert wait_for(lambda: quiet(service))
        assert service.metric("apar:gateway_answers_in_flight") == 0

    def test_leaving_the_loop_over_a_stream_cancels(self, service: ServedProcess, client: openai.OpenAI) -> None:
        with client.chat.completions.create(model="tiny", messages=user("Hm?"), stream=True, **ENDLESS) as stream:
            next(iter(stream))
        assert wait_for(lambda: quiet(service))

    def test_deadline(self, service: ServedProcess, client: openai.OpenAI) -> None:
        body = {**ENDLESS["extra_body"], "timeout_ms": 50}  # type: ignore[dict-item]
        with pytest.raises(openai.InternalServerError) as late:
            client.chat.completions.create(model="tiny", messages=user("Hm?"), max_tokens=900, extra_body=body)
        assert late.value.status_code == 504 and late.value.code == "deadline_exceeded"
        assert wait_for(lambda: quiet(service))


class TestLimits:
    def test_keys(self, strict: ServedProcess) -> None:
        for key in ("wrong", "first-ke", "first-key2", "é"):
            with pytest.raises((openai.AuthenticationError, UnicodeEncodeError)):
                strict.client(key).models.list()
        for key in ("first-key", "second-key"):
            assert strict.client(key).models.list().data
        assert exchange(strict, b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 401")
        assert strict.get("/health") and strict.get("/metrics")

    def test_too_many_answers(self, strict: ServedProcess) -> None:
        client = strict.client("first-key")
        streams = [
            # More is to come than fits between them and a client that does not read: so they do not end.
            client.chat.completions.create(
                model="tiny", messages=user("Hm?"), stream=True, n=4, logprobs=True, top_logprobs=20, **ENDLESS
            )
            for _ in range(2)
        ]
        with pytest.raises(openai.RateLimitError) as refused:
            client.completions.create(model="tiny", prompt="a")
        assert int(refused.value.response.headers["Retry-After"]) >= 1
        assert refused.value.code == "overloaded"
        for stream in streams:
            stream.close()
        assert wait_for(lambda: strict.metric("apar:gateway_answers_in_flight") == 0)
        assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="tiny", prompt=["a"] * 9)

    def test_large_bodies(self, strict: ServedProcess) -> None:
        with pytest.raises(openai.APIStatusError) as refused:
            strict.client("first-key").completions.create(model="tiny", prompt="x" * 20_000)
        assert refused.value.status_code == 413
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer first-key\r\n"
        chunks = head + b"Transfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + b"x" * 4096 + b"\r\n"
        assert exchange(strict, chunks + (b"1000\r\n" + b"x" * 4096 + b"\r\n") * 4).startswith(b"HTTP/1.1 413")
        assert exchange(strict, head + b"Content-Length: 99999999999\r\n\r\n").startswith(b"HTTP/1.1 413")


def exchange(service: ServedProcess, sent: bytes, seconds: float = 10.0) -> bytes:
    """What comes back for these bytes, up to the first pause or the connection's end."""
    with socket.create_connection(service.address, timeout=seconds) as connection:
        connection.sendall(sent)
        received = b""
        try:
            while not received.endswith(b"}"):
                part = connection.recv(65536)
                if not part:
                    break
                received += part
        except (TimeoutError, ConnectionError):
            pass
        return received


def post(body: bytes, path: str = "/v1/chat/completions", more: bytes = b"") -> bytes:
    length = str(len(body)).encode()
    return (
        b"POST "
        + path.encode()
        + b" HTTP/1.1\r\nHost: x\r\nContent-Length: "
        + length
        + b"\r\n"
        + more
        + b"\r\n"
        + body
    )


DEEP = b'{"model": "tiny", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
PLAIN = b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}'


class TestHostileHttp:
    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (post(DEEP), 400),
            (post(b'{"model": "tiny", "messages": [' + b'{"a":' * 60_000), 400),
            (post(b"\xff\xfe"), 400),
            (post(b""), 400),
            (post(b"[1]"), 400),
            (post(b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}'), 400),
            (post(b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": NaN}'), 400),
            (post(b'{"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 1e999}'), 400),
            (post(PLAIN.replace(b'"max_tokens": 1', b'"stop": ' + json.dumps(["x"] * 100_000).encode())), 400),
            (post(PLAIN, more=b"Content-Encoding: gzip\r\n"), 415),
            (post(PLAIN, "/v1/chat/completion"), 404),
            (post(PLAIN, "/v2/models/apar/generate"), 404),
            (post(PLAIN, "/v2/repository/index"), 404),
            (b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", 405),
            (b"GARBAGE\r\n\r\n", 400),
            (b"GET /v1/models HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 100_000 + b"\r\n\r\n", 400),
            # Metadata that crashes the server behind when it is passed on.
            (post(PLAIN, more=b"triton_grpc_error: true\r\n"), 200),
            (post(PLAIN.replace(b"hi", b"a\\u0000b"), more=b"X-Request-Id: a\r\n"), 200),
        ],
    )
    def test_gets_a_status(self, sent: bytes, status: int, service: ServedProcess) -> None:
        answer = exchange(service, sent)
        assert answer.startswith((b"HTTP/1.1 %d" % status, b"HTTP/1.0 %d" % status)), answer[:300]

    def test_refusals_are_openais(self, service: ServedProcess) -> None:
        body = json.loads(exchange(service, post(DEEP)).partition(b"\r\n\r\n")[2])
        assert body["error"]["code"] == "json_too_deep" and body["error"]["type"] == "invalid_request_error"

    def test_the_service_is_still_there(self, service: ServedProcess, client: openai.OpenAI) -> None:
        for _ in range(20):
            with socket.create_connection(service.address) as connection:
                connection.sendall(post(PLAIN)[:-10])  # never complete
        assert client.completions.create(model="tiny", prompt="a", max_tokens=1).choices
        assert json.loads(service.get("/health"))["status"] == "healthy"
        assert service.metric("apar:gateway_server_restarts") == 0
        assert wait_for(lambda: quiet(service))


class TestMetrics:
    def test_both_halves(self, service: ServedProcess, client: openai.OpenAI) -> None:
        before = service.metric("apar:gateway_requests_total")
        client.completions.create(model="tiny", prompt="a", max_tokens=3)
        text = service.get("/metrics").decode()
        assert service.metric("apar:gateway_requests_total") > before
        assert service.metric("apar:gateway_server_up") == 1
        assert wait_for(lambda: service.metric("apar:generation_tokens_total") > 0)
        assert "nv_inference_request_success" in text
        names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
        assert len(names) == len(set(names)), "no metric twice"

    def test_first_token_is_measured_once_a_request(self, service: ServedProcess, client: openai.OpenAI) -> None:
        before = service.metric("apar:gateway_time_to_first_token_seconds_count")
        began = time.monotonic()
        client.completions.create(model="tiny", prompt="a", max_tokens=30)
        assert service.metric("apar:gateway_time_to_first_token_seconds_count") == before + 1
        assert service.metric("apar:gateway_request_seconds_sum") > 0
        assert time.monotonic() - began < 60
