"""工具循环：调用真的被执行、结果真的回到模型眼前、坏调用与写不停的模型都停得下来。"""

import json

import pytest

from minimind import chat
from minimind.errors import UserError
from minimind.inference import tool_loop
from minimind.inference.chat import ChatSession
from minimind.inference.sampling import GREEDY
from minimind.inference.tool_loop import Stopped, ToolResult, ToolSession
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.tokenizer import encode_chat, load_tokenizer
from minimind.tools import EXAMPLE_TOOLS, Toolbox


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def make_session(tokenizer, monkeypatch, replies, **options):
    """模型依次说出 ``replies`` 里的消息；返回会话与它每次看到的提示。"""
    config = MiniMindConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=2048
    )
    start = len(encode_chat(tokenizer, [], add_generation_prompt=True).ids)
    script, seen = iter(replies), []

    def speak(model, ids, **_):
        seen.append(tokenizer.decode(ids))
        written = encode_chat(tokenizer, [{"role": "assistant", **next(script)}]).ids[start:]
        if seen[-1].endswith("<think>\n"):  # 提示里预填了 <think> 与换行，模型从思考的正文写起
            assert tokenizer.decode(written[:2]) == "<think>\n"
            written = written[2:]
        return iter(written[: written.index(tokenizer.eos_token_id)])

    monkeypatch.setattr(tool_loop, "stream_tokens", speak)
    thinking = options.pop("enable_thinking", None)
    chat_session = ChatSession(
        MiniMindForCausalLM(config), tokenizer, GREEDY, enable_thinking=thinking, history_messages=2
    )
    return ToolSession(chat_session, Toolbox(EXAMPLE_TOOLS), **options), seen


def call(name, **arguments):
    return {"content": "", "tool_calls": [{"name": name, "arguments": arguments}]}


def test_调用_结果_回答_走完一圈(tokenizer, monkeypatch):
    session, seen = make_session(
        tokenizer, monkeypatch, [call("calculator", expression="347*28"), {"content": "结果是9716。"}]
    )
    text = "".join(session.reply("347*28 是多少？"))
    assert text == ('[调用] calculator {"expression": "347*28"}\n[结果] {"result": "9716"}\n结果是9716。')
    assert '"name": "look_up"' in seen[0] and "9716" not in seen[0]
    assert '<tool_response>\n{"result": "9716"}\n</tool_response>' in seen[1]
    # 第二次的提示以第一次的提示为前缀：KV 缓存可以接着用
    assert seen[1].startswith(seen[0])
    assert session.speed.tokens > 0


@pytest.mark.parametrize("switch", [None, False, True])
def test_思考开关三种状态下_后一次的提示都以前一次写完为止的全文开头(tokenizer, monkeypatch, switch):
    """否则 KV 缓存接不上，模型看到的历史也与它写的不同。"""
    first = call("calculator", expression="1+1") | ({"reasoning_content": "想想"} if switch else {})
    session, seen = make_session(
        tokenizer,
        monkeypatch,
        [first, {"content": "2"} | ({"reasoning_content": "嗯"} if switch else {})],
        enable_thinking=switch,
    )
    list(session.reply("1+1？"))
    tail = {None: "", False: "<think>\n\n</think>\n\n", True: "<think>\n"}[switch]
    assert seen[0].endswith(f"assistant\n{tail}") and seen[1].startswith(seen[0])
    assert session.turns[0][1].get("reasoning_content") == {None: None, False: "", True: "想想"}[switch]


def test_一次几个调用_逐个给结果(tokenizer, monkeypatch):
    both = {
        "content": "我来算。",
        "tool_calls": [
            {"name": "calculator", "arguments": {"expression": "1+1"}},
            {"name": "convert_unit", "arguments": {"value": 1, "from_unit": "里", "to_unit": "米"}},
        ],
    }
    session, seen = make_session(tokenizer, monkeypatch, [both, {"content": "好了。"}])
    results = [event.result for event in session.events("算") if isinstance(event, ToolResult)]
    assert [json.loads(result)["result"] for result in results] == ["2", "500"]
    assert seen[1].count("<tool_response>") == 2


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ("<tool_call>这不是 JSON</tool_call>", "不是合法的 JSON"),
        ('<tool_call>{"name": "rm", "arguments": {}}</tool_call>', "没有工具 rm"),
        ('<tool_call>{"name": "calculator", "arguments": {"expression": "1/0"}}</tool_call>', "不能除以零"),
        ('<tool_call>{"name": "calculator", "argum', "没有写完"),
    ],
)
def test_坏调用得到一句错误_模型可以接着说(tokenizer, monkeypatch, raw, said):
    session, seen = make_session(tokenizer, monkeypatch, [{"content": raw}, {"content": "算不了。"}])
    text = "".join(session.reply("算"))
    assert said in text and text.endswith("算不了。")
    assert said in seen[1]


def test_写不停的模型到轮数上限为止(tokenizer, monkeypatch):
    again = [call("calculator", expression="1+1")] * 9
    session, seen = make_session(tokenizer, monkeypatch, again, max_rounds=2)
    events = list(session.events("算"))
    assert isinstance(events[-1], Stopped) and len(seen) == 3
    assert sum(isinstance(event, ToolResult) for event in events) == 2
    assert "2 轮工具" in "".join(session.reply("再算"))


def test_一轮里写太多个调用_多出的不执行(tokenizer, monkeypatch):
    many = {"content": "", "tool_calls": [{"name": "calculator", "arguments": {"expression": "1"}}] * 12}
    session, _ = make_session(tokenizer, monkeypatch, [many, {"content": "好。"}])
    results = [json.loads(event.result) for event in session.events("算") if isinstance(event, ToolResult)]
    assert len(results) == 12 and sum("error" in result for result in results) == 4


def test_历史带着上一轮的调用与结果(tokenizer, monkeypatch):
    replies = [call("calculator", expression="6*7"), {"content": "是42。"}, {"content": "不客气。"}]
    session, seen = make_session(tokenizer, monkeypatch, replies)
    list(session.reply("6*7？"))
    list(session.reply("谢谢"))
    assert "6*7？" in seen[2] and '{"result": "42"}' in seen[2] and "是42。" in seen[2]
    session.chat.history_messages = 0
    assert "42" not in tokenizer.decode(session.encode([{"role": "user", "content": "再见"}]))


def test_放不下时从最早的一轮丢起(tokenizer, monkeypatch):
    session, _ = make_session(tokenizer, monkeypatch, [{"content": "嗯" * 900}, {"content": "好"}])
    list(session.reply("讲" * 900))
    list(session.reply("继" * 900))
    assert session.dropped == 2


def test_思考显示在标签里(tokenizer, monkeypatch):
    replies = [call("calculator", expression="2*3") | {"reasoning_content": "要乘一下"}, {"content": "6。"}]
    session, _ = make_session(tokenizer, monkeypatch, replies)
    text = "".join(session.reply("2*3？"))
    assert text.startswith("<think>\n要乘一下\n</think>\n\n[调用] calculator")
    assert session.turns[0][1]["reasoning_content"] == "要乘一下"


def test_命令行_预训练权重与写错的名字在读权重之外就说清():
    args = chat.ChatArguments(tools=1, tool_names="calculatr", save_dir="no/such", device="cpu")
    with pytest.raises(UserError, match="没有工具 calculatr"):
        chat.open_session(args)
    with pytest.raises(UserError, match="--tool_rounds：值是 0"):
        chat.open_session(chat.ChatArguments(tools=1, tool_rounds=0))
