"""远程采样：用一个本机的替身服务核对请求，并看出错时说的话。"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file

from minimind.errors import UserError
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.rl.remote import RemoteRollout
from minimind.rl.rollout import response_batch

EOS = 2


class Stand:
    """替身服务：按路径给出答复，记下收到的请求。答复是函数则拿请求体调用它，是整数则当状态码。"""

    def __init__(self, replies):
        self.replies, self.requests = replies, []
        stand = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, body):
                stand.requests.append((self.path, body, self.headers.get("Authorization")))
                reply = stand.replies.get(self.path, 404)
                reply = reply(body) if callable(reply) else reply
                status, data = (
                    (reply, b"nope") if isinstance(reply, int) else (200, json.dumps(reply).encode())
                )
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self):
                self.answer(None)

            def do_POST(self):
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def bodies(self, path):
        return [body for got, body, _ in self.requests if got == path]


@pytest.fixture
def stand():
    made = []

    def make(replies):
        made.append(Stand(replies))
        return made[-1]

    yield make
    for one in made:
        one.server.shutdown()
        one.server.server_close()


def completions(body):
    """每条回答：提示的长度、第几个、结束符；最后一条写满。次序故意倒着给。"""
    n = len(body["prompt"])
    choices = [
        {
            "index": i,
            "token_ids": [100 + n, 200 + i] + ([EOS] if i < body["n"] - 1 else [7]),
            "logprobs": {"token_logprobs": [-0.5, -0.25 * (i + 1), -0.1]},
            "finish_reason": "stop" if i < body["n"] - 1 else "length",
        }
        for i in range(body["n"])
    ]
    return {"choices": choices[::-1]}


def openai(root=None, reply=completions, **more):
    return {"/v1/models": {"data": [{"id": "policy", "root": root}]}, "/v1/completions": reply, **more}


OPTIONS = {"max_new_tokens": 3, "temperature": 0.9}


def test_OpenAI兼容_token进token出(stand, tokenizer):
    server = stand(openai())
    remote = RemoteRollout(server.url + "/v1/", tokenizer, api_key="钥匙".encode().hex(), **OPTIONS)
    assert remote.kind == "vllm"
    rollout = remote.generate([[5, 6], [7, 8, 9]], 2, seed=3)
    assert rollout.responses == [[102, 200, EOS], [102, 201, 7], [103, 200, EOS], [103, 201, 7]]
    assert rollout.prompts == [[5, 6], [5, 6], [7, 8, 9], [7, 8, 9]] and rollout.group == [0, 0, 1, 1]
    assert rollout.truncated == [False, True, False, True]
    torch.testing.assert_close(rollout.logprobs[1], torch.tensor([-0.5, -0.5, -0.1]))
    assert rollout.texts[0] == tokenizer.decode([102, 200])
    bodies = sorted(server.bodies("/v1/completions"), key=lambda body: len(body["prompt"]))
    assert [body["prompt"] for body in bodies] == [[5, 6], [7, 8, 9]]
    want = {"model": "policy", "n": 2, "max_tokens": 3, "temperature": 0.9, "top_p": 1.0}
    assert all(want.items() <= body.items() for body in bodies)
    assert all(body["return_token_ids"] is True and body["logprobs"] is not None for body in bodies)
    assert bodies[0]["seed"] != bodies[1]["seed"]
    assert {key for _, _, key in server.requests} == {f"Bearer {'钥匙'.encode().hex()}"}
    batch = response_batch(rollout, slice(None))
    assert len(batch["old_logps"]) == 12


def test_SGLang的接口(stand, tokenizer):
    def generate(body):
        pairs = [[-0.5, 30, None], [-0.25, EOS, None]]
        one = {"meta_info": {"output_token_logprobs": pairs, "finish_reason": {"type": "stop"}}}
        return one if body["sampling_params"]["n"] == 1 else [one] * body["sampling_params"]["n"]

    server = stand({"/get_model_info": {"model_path": "x"}, "/generate": generate})
    remote = RemoteRollout(server.url, tokenizer, **OPTIONS)
    assert remote.kind == "sglang"
    for n in (1, 2):
        rollout = remote.generate([[5, 6]], n, seed=3)
        assert rollout.responses == [[30, EOS]] * n and rollout.truncated == [False] * n
        assert rollout.logprobs[0].tolist() == [-0.5, -0.25]
    body = server.bodies("/generate")[0]
    assert body["input_ids"] == [5, 6] and body["return_logprob"] is True
    assert {"max_new_tokens": 3, "temperature": 0.9, "top_k": -1}.items() <= body["sampling_params"].items()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return MiniMindForCausalLM(
        MiniMindConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    )


def test_送权重给vLLM_写进它启动时的目录再让它重读(stand, tokenizer, model, tmp_path):
    from transformers import AutoModelForCausalLM

    server = stand(openai(str(tmp_path / "served"), **{"/collective_rpc": {}, "/reset_prefix_cache": {}}))
    RemoteRollout(server.url, tokenizer, **OPTIONS).push_weights(model)
    assert server.bodies("/collective_rpc") == [{"method": "reload_weights"}]
    order = [path for path, _, _ in server.requests]
    assert order.index("/collective_rpc") < order.index("/reset_prefix_cache")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    ids = torch.tensor([[3, 9, 20, 33]])
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-4)


def test_送权重给SGLang(stand, tokenizer, model, tmp_path):
    replies = {"/get_model_info": {}, "/update_weights_from_disk": {"success": True, "message": ""}}
    server = stand(replies)
    remote = RemoteRollout(server.url, tokenizer, weights_dir=tmp_path, **OPTIONS)
    remote.push_weights(model)
    assert server.bodies("/update_weights_from_disk") == [{"model_path": str(tmp_path)}]
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["model.embed_tokens.weight"], model.model.embed_tokens.weight)
    assert "lm_head.weight" not in saved
    replies["/update_weights_from_disk"] = {"success": False, "message": "形状不对"}
    with pytest.raises(UserError, match="形状不对"):
        remote.push_weights(model)


def test_服务没开_说清怎么办(tokenizer):
    with pytest.raises(UserError, match=r"连不上采样服务.*--rollout_url"):
        RemoteRollout("http://127.0.0.1:9", tokenizer, **OPTIONS)


def without(name):
    def reply(body):
        answer = completions(body)
        for choice in answer["choices"]:
            choice[name] = None
        return answer

    return reply


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (without("token_ids"), "没有 token id.*return_token_ids"),
        (without("logprobs"), "对数概率却有 0 个"),
        (without("finish_reason"), "没有正常结束"),
        ({"choices": []}, "要 2 条回答，只给了 0 条"),
        (500, "/v1/completions 答复 500：nope"),
    ],
)
def test_答复缺东西_报错而不是凑合(stand, tokenizer, reply, message):
    remote = RemoteRollout(stand(openai(reply=reply)).url, tokenizer, **OPTIONS)
    with pytest.raises(UserError, match=message):
        remote.generate([[5, 6]], 2, seed=0)


def test_vLLM没开重读的接口或不知道目录(stand, tokenizer, model, tmp_path):
    server = stand(openai())
    with pytest.raises(UserError, match="weights_dir"):
        RemoteRollout(server.url, tokenizer, **OPTIONS).push_weights(model)
    with pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE"):
        RemoteRollout(server.url, tokenizer, weights_dir=tmp_path, **OPTIONS).push_weights(model)
