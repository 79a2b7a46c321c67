"""造坏请求：坏的 JSON、坏的字段、坏的编码、坏的地址与方法、坏的 HTTP。由种子决定，失败了能重来。"""

from __future__ import annotations

import errno
import http.client
import json
import random
import socket
from dataclasses import dataclass

DEEP = "[" * 5000 + "]" * 5000
JUNK = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**40, 0.5, -1e308, 1e999),
    *("", "x", "\x00", "\ud800", "好" * 2000, "a" * 20_000, "💥", "<|im_end|>", "\\u0000", "nan"),
    *([], [None], [[]], [[[1]]], [-1], [10**9], ["x", 1], [0] * 5000, {}, {"x": {"y": [None]}}),
    *({"type": "object"}, {"type": "json_schema", "json_schema": {"schema": {"type": 3}}}, [{"role": 1}]),
]
MESSAGE = {"role": "user", "content": "你好"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
SAMPLING = {
    **{"model": "minimind", "stream": False, "temperature": 1.0, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
    **{"presence_penalty": 0.1, "frequency_penalty": 0.1, "repetition_penalty": 1.1, "seed": 1, "n": 1},
    **{"logit_bias": {"5": 1}, "stop": ["停"], "stream_options": {"include_usage": True}, "max_tokens": 1},
}
BODIES = {
    "/v1/chat/completions": {
        **SAMPLING,
        **{"messages": [MESSAGE], "max_completion_tokens": 1, "logprobs": True, "top_logprobs": 2},
        **{"tools": [TOOL], "tool_choice": "auto", "parallel_tool_calls": True, "enable_thinking": False},
        **{"response_format": {"type": "text"}, "chat_template_kwargs": {}},
    },
    "/v1/completions": {
        **SAMPLING,
        **{"prompt": "你好", "echo": False, "logprobs": 1, "return_token_ids": True, "best_of": 1},
    },
    "/tokenize": {"model": "minimind", "prompt": "你好", "add_special_tokens": False},
    "/detokenize": {"model": "minimind", "tokens": [1, 2, 3]},
}
HEADERS = {"Content-Type": "application/json"}


@dataclass
class Bad:
    """一个坏请求；``raw`` 不为空时整段照发，不经过 HTTP 库。"""

    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] | None = None
    raw: bytes = b""


def dumps(value: object) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


class Fuzzer:
    """``Fuzzer(种子).make()`` 给一个坏请求。"""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        kinds = {"_field": 10, "_nested": 4, "_broken_json": 4, "_not_object": 2, "_encoding": 2}
        kinds |= {"_too_long": 1, "_address": 2, "_header": 1, "_raw": 1}
        self.kinds = [name for name, weight in kinds.items() for _ in range(weight)]

    def make(self) -> Bad:
        path = self.rng.choice(list(BODIES))
        return getattr(self, self.rng.choice(self.kinds))(path, dict(BODIES[path]))

    def _field(self, path: str, body: dict) -> Bad:
        """几个字段填乱值，或者缺了、多了字段。"""
        for name in self.rng.sample(list(body), self.rng.randint(1, min(3, len(body)))):
            body[name] = self.rng.choice(JUNK)
        if self.rng.random() < 0.2:
            del body[self.rng.choice(list(body))]
        if self.rng.random() < 0.2:
            body[self.rng.choice(["", "x" * 500, "__proto__", "消息"])] = self.rng.choice(JUNK)
        return Bad("POST", path, dumps(body), HEADERS)

    def _nested(self, path: str, body: dict) -> Bad:
        """消息、工具、约束里面的字段填乱值。"""
        rng, path = self.rng, "/v1/chat/completions"
        body = dict(BODIES[path])
        message = {"role": rng.choice(["user", "assistant", "tool", "system", *JUNK]), "content": "x"}
        for name in rng.sample(["role", "content", "tool_calls", "name", "reasoning_content"], 2):
            message[name] = rng.choice(JUNK)
        part = {"type": rng.choice(["text", "image_url", *JUNK]), "text": rng.choice(JUNK)}
        call = {"id": rng.choice(JUNK), "function": rng.choice([{"name": rng.choice(JUNK)}, *JUNK])}
        schema = {"type": rng.choice(["object", "array", "怪", *JUNK]), "properties": rng.choice(JUNK)}
        schema |= {"$ref": rng.choice(["#", "#/x", *JUNK])} if rng.random() < 0.3 else {}
        body |= rng.choice(
            [
                {"messages": [message]},
                {"messages": [{**MESSAGE, "content": [part]}]},
                {"messages": [{"role": "assistant", "tool_calls": [call]}]},
                {"messages": [MESSAGE] * 5000},
                {"tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}]},
                {"tools": [{**TOOL, "function": rng.choice(JUNK)}]},
                {"tool_choice": {"type": "function", "function": {"name": rng.choice(JUNK)}}},
                {"tool_choice": "required", "tools": [{**TOOL, "function": {"name": rng.choice(JUNK)}}]},
                {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
                {"response_format": {"type": rng.choice(JUNK), "json_schema": rng.choice(JUNK)}},
                {"logit_bias": {str(rng.choice(JUNK)): rng.choice(JUNK)}},
                {"stop": [rng.choice(JUNK) for _ in range(rng.randint(1, 30))]},
            ]
        )
        return Bad("POST", path, dumps(body), HEADERS)

    def _broken_json(self, path: str, body: dict) -> Bad:
        """截断、插入、替换字节，或根本不是 JSON。"""
        data = bytearray(dumps(body))
        how = self.rng.randrange(5)
        if how == 0:
            del data[self.rng.randrange(len(data)) :]
        elif how == 1:
            for _ in range(self.rng.randint(1, 8)):
                data[self.rng.randrange(len(data))] = self.rng.randrange(256)
        elif how == 2:
            at = self.rng.randrange(len(data))
            data[at:at] = self.rng.randbytes(self.rng.randint(1, 30))
        elif how == 3:
            data = bytearray(self.rng.randbytes(self.rng.randint(0, 300)))
        else:
            data = bytearray(self.rng.choice([DEEP, "{" * 3000, '{"a":' * 3000, "NaN", "1" * 5000]).encode())
        return Bad("POST", path, bytes(data), HEADERS)

    def _not_object(self, path: str, body: dict) -> Bad:
        return Bad("POST", path, dumps(self.rng.choice(JUNK)), HEADERS)

    def _encoding(self, path: str, body: dict) -> Bad:
        """内容类型与编码对不上。"""
        kind = self.rng.choice(
            ["text/plain", "application/xml", "multipart/form-data", "", "application/json; charset=x"]
        )
        code = self.rng.choice(["utf-16", "utf-32", "utf-7", "utf-8"])
        text = json.dumps(body, ensure_ascii=False)
        return Bad("POST", path, text.encode(code), {"Content-Type": kind} if kind else {})

    def _too_long(self, path: str, body: dict) -> Bad:
        """放不下的提示。"""
        text = "长" * self.rng.randint(3000, 20_000)
        body |= (
            {"prompt": text} if path == "/v1/completions" else {"messages": [{**MESSAGE, "content": text}]}
        )
        if path == "/detokenize":
            body["tokens"] = [self.rng.randrange(10**6) for _ in range(2000)]
        return Bad("POST", path, dumps(body), HEADERS)

    def _address(self, path: str, body: dict) -> Bad:
        """没有的地址，或对的地址用错的方法。"""
        rng = self.rng
        if rng.random() < 0.5:
            return Bad(rng.choice(["GET", "PUT", "DELETE", "PATCH", "HEAD"]), path)
        odd = [
            "/v1",
            "/v1/models/" + "x" * 500,
            "/static/../app.py",
            "/static/%2e%2e/app.py",
            "/%00",
            "/v1//models",
        ]
        return Bad(
            rng.choice(["GET", "POST"]), rng.choice([*odd, "/" + rng.randbytes(8).hex()]), b"{}", HEADERS
        )

    def _header(self, path: str, body: dict) -> Bad:
        rng = self.rng
        headers = {
            **HEADERS,
            "Authorization": rng.choice(["Bearer", "x" * 5000, "Basic \xff", "Bearer \xe9"]),
        }
        headers["Accept"] = rng.choice(["*/*", "text/html", "x" * 2000])
        return Bad("POST", path, dumps({**body, "messages": 3, "prompt": {}, "tokens": None}), headers)

    def _raw(self, path: str, body: dict) -> Bad:
        """不成样子的 HTTP。"""
        rng, data = self.rng, dumps(body)
        start = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
        return Bad(
            *("RAW", path),
            raw=rng.choice(
                [
                    rng.randbytes(rng.randint(1, 200)) + b"\r\n\r\n",
                    b"GET\r\n\r\n",
                    b"POST / HTTP/9.9\r\n\r\n",
                    start + b"Content-Length: -5\r\n\r\n" + data,
                    start + b"Content-Length: 99999999999999999999\r\n\r\n" + data,
                    start + f"Content-Length: {len(data) + 50}\r\n\r\n".encode() + data,
                    start + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n" + data,
                    start + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
                    start + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
                ]
            ),
        )


class Sender:
    """一条长连接，断了就重连；给出状态码，服务器没答就断开的是 0。"""

    def __init__(self, port: int, timeout: float = 60.0):
        self.port, self.timeout = port, timeout
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)

    def send(self, bad: Bad) -> int:
        """
        Raises:
            TimeoutError: 过了 ``timeout`` 秒还没有答复，也没有断开。
        """
        if bad.raw:
            return self._send_raw(bad.raw)
        try:
            headers = {name: value.encode("latin-1") for name, value in (bad.headers or {}).items()}
            self.connection.request(bad.method, bad.path, bad.body, headers)
            reply = self.connection.getresponse()
            reply.read()
            return reply.status
        except (http.client.HTTPException, ConnectionError):
            self.connection.close()
            return 0

    def _send_raw(self, data: bytes) -> int:
        """服务器不等写完就拒绝的，断在哪一句看谁快：发、半关、收都可能碰上，答复已经到了的照样读出来。"""
        with socket.create_connection(("127.0.0.1", self.port), timeout=self.timeout) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)  # 没写完的请求：告诉它不会再有了
            except OSError as error:
                if not hung_up(error):
                    raise
            try:
                line = connection.recv(200).split(b"\r\n")[0].split()
            except ConnectionError:
                return 0
        return int(line[1]) if len(line) > 1 and line[1].isdigit() else 0


def hung_up(error: OSError) -> bool:
    """是对方先断开了；已经断开的连接半关时是 ENOTCONN，它不是 :class:`ConnectionError`。"""
    return isinstance(error, ConnectionError) or error.errno == errno.ENOTCONN
