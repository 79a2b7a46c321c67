"""别人的目录，真的服务与真的对话：提示的 id 就是它自己模板的，停在它自己的结束符，模板拒绝的是 400。"""

from __future__ import annotations

import json

import httpx
import pytest
import torch
from other_models import write_model
from processes import ServerProcess

from minimind import chat
from minimind.errors import UserError
from minimind.inference.loading import load_for_inference, stop_ids
from minimind.tokenizer import encode_chat, load_tokenizer, render_text

TALK = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好，世界。"},
    {"role": "user", "content": "今天天气怎么样？"},
]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
KINDS = ("llama", "mistral", "qwen", "minimind3")


def template_ids(folder, messages, **options) -> list[int]:
    return load_tokenizer(folder).apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=True, **options
    )


@torch.no_grad()
def greedy(model, ids: list[int], count: int) -> list[int]:
    """transformers 的模型自己算的，不缓存。"""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-count:]


def stop_at(folder, token: int) -> None:
    """把一个词元加进 generation_config 的结束符。"""
    path = folder / "generation_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**config, "eos_token_id": [*config["eos_token_id"], token]}), "utf-8")


@pytest.fixture(scope="module", params=KINDS)
def made(request, tmp_path_factory):
    """一个目录、它贪心写的前几个词元；第一个新出现在第 3 位之后的词元是它的结束符。"""
    folder = tmp_path_factory.mktemp("other") / request.param
    model = write_model(folder, request.param)
    written = greedy(model, template_ids(folder, TALK), 12)
    at = next(i for i in range(3, 12) if written[i] not in written[:i])
    stop_at(folder, written[at])
    return request.param, folder, written[:at]


def test_服务_id与结束符都是目录自己的(made, tmp_path):
    kind, folder, written = made
    with ServerProcess("--load_from", folder, "--dtype", "float32", folder=tmp_path) as server:
        told = "minimind-3 的对话布局" if kind == "minimind3" else "自己的对话模板"
        assert told in server.output()

        def post(path, **body):
            return httpx.post(server.url + path, json={"messages": TALK, **body}, timeout=60)

        assert post("/tokenize").json()["tokens"] == template_ids(folder, TALK)
        reply = post("/v1/chat/completions", temperature=0, max_tokens=40).json()
        assert reply["usage"]["prompt_tokens"] == len(template_ids(folder, TALK))
        assert reply["choices"][0]["finish_reason"] == "stop"
        text = load_tokenizer(folder).decode(written, skip_special_tokens=True)
        assert reply["choices"][0]["message"]["content"].strip() == text.strip()

        # 续写的开头：分词器自己加的（Llama 的 bos），没有就不加（Qwen）；公共 minimind 不自己加，训练时有
        plain = load_tokenizer(folder)("你好")["input_ids"]
        plain = [load_tokenizer(folder).bos_token_id, *plain] if kind == "minimind3" else plain
        asked = {"prompt": "你好", "messages": None}
        assert post("/tokenize", **asked, add_special_tokens=True).json()["tokens"] == plain
        text = post("/v1/completions", **asked, max_tokens=2, echo=True, logprobs=0).json()
        assert text["usage"]["prompt_tokens"] == len(plain)
        assert (text["choices"][0]["logprobs"]["token_logprobs"][0] is None) == (kind == "qwen")

        tools = post("/v1/chat/completions", tools=[TOOL], max_tokens=4)
        assert tools.status_code == (200 if kind in ("qwen", "minimind3") else 400), tools.text
        if kind == "mistral":
            refused = post("/v1/chat/completions", messages=[{"role": "system", "content": "规矩"}, *TALK])
            assert refused.status_code == 400
            assert "roles must alternate" in refused.json()["error"]["message"]
            assert refused.json()["error"]["param"] == "messages"
        resumed = [TALK[0], {"role": "assistant", "content": "从前"}]
        answer = post("/v1/chat/completions", messages=resumed, continue_final_message=True, max_tokens=4)
        assert answer.status_code == 200, answer.text
        ids = post("/tokenize", messages=resumed, continue_final_message=True).json()["tokens"]
        assert load_tokenizer(folder).decode(ids).endswith("从前")


def test_对话_id与结束符都是目录自己的(made):
    _, folder, written = made
    args = chat.ChatArguments(
        load_from=str(folder), device="cpu", dtype="float32", historys=2, temperature=0.0, max_new_tokens=40
    )
    session = chat.open_session(args)
    session.messages = TALK[:2]
    ids = session.encode(TALK[2]["content"])
    assert ids == template_ids(folder, TALK)
    assert "".join(session.reply(TALK[2]["content"])) == session.tokenizer.decode(
        written, skip_special_tokens=True
    )
    assert session.speed.tokens == len(written)


def test_对话_模板拒绝与不会的工具_一句话(made, capsys):
    kind, folder, _ = made
    common = ["--load_from", str(folder), "--device", "cpu", "--max_new_tokens", "2", "--prompt", "你好"]
    code = chat.main([*common, "--tools", "1"])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if kind in ("qwen", "minimind3"):
        assert code == 0, error
    else:
        assert code == 2 and "工具" in error
    assert chat.main([*common, "--open_thinking", "1"]) == (0 if kind in ("qwen", "minimind3") else 2)
    assert chat.main([*common, "--open_thinking", "0"]) == 0


@pytest.mark.parametrize(
    ("kind", "plain", "said"), [("无模板", True, "只会续写"), ("无模板有ChatML", False, "用本项目的")]
)
def test_没有模板的目录_说清怎么办(tmp_path, capsys, kind, plain, said):
    write_model(tmp_path / "hf", kind)
    loaded = load_for_inference(load_from=str(tmp_path / "hf"), device="cpu")
    assert loaded.plain == plain and said in capsys.readouterr().err
    assert loaded.tokenizer.eos_token_id in stop_ids(loaded.model, loaded.tokenizer)


def test_换一份对话模板(tmp_path, capsys):
    write_model(tmp_path / "hf", "qwen")
    common = {"load_from": str(tmp_path / "hf"), "device": "cpu", "dtype": "float32"}
    ours = load_for_inference(chat_template="minimind", **common).tokenizer
    assert ours.decode(encode_chat(ours, TALK, add_generation_prompt=True).ids) == render_text(
        TALK, None, True
    )
    file = tmp_path / "t.jinja"
    file.write_text("{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}", "utf-8")
    own = load_for_inference(chat_template=str(file), **common).tokenizer
    assert own.decode(encode_chat(own, TALK[:1], add_generation_prompt=True).ids) == "<|im_start|>你好"
    for text, said in (("{{ 1 }}", "没有用户的话"), ("{% for %}", "不接受"), (None, "不存在")):
        file.write_text(text, "utf-8") if text else file.unlink()
        with pytest.raises(UserError, match=f"--chat_template.*{said}"):
            load_for_inference(chat_template=str(file), **common)
