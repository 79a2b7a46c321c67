"""公共 minimind-3 的替身：照它公布的结构、文件名与写法造的小东西。

宽度、头数、词表与公开的相同，只有层数少；权重是随机的，照它的办法存（fp16，共享的两个键都在，没有旁注）。分词器是自己训练的一个小的，
对话模板渲染出的字与它的相同。
"""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlparse

import torch
from other_models import write_tokenizer

LAYERS = 1


def _tool(name: str, **properties: str) -> dict:
    fields = {key: {"type": kind} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": fields, "required": list(fields)}
    return {
        "type": "function",
        "function": {"name": name, "description": f"{name} 的说明", "parameters": parameters},
    }


MATH = json.dumps([_tool("calculate_math", expression="string")], ensure_ascii=False)
MANY = json.dumps(
    [_tool("get_current_weather", location="string"), _tool("calculate_math", expression="string")],
    ensure_ascii=False,
)


def _ask(i: int) -> list[dict]:
    return [{"role": "user", "content": f"{i}加{i + 1}等于多少？"}]


def _turns(i: int) -> list[dict]:
    return [*_ask(i), {"role": "assistant", "content": f"{i}加{i + 1}等于{2 * i + 1}。"}]


def _pretrain(i: int) -> dict:
    return {"text": f"第{i}段：清晨的阳光透过窗帘洒进房间，桌上的书页被风翻到了第{i}页。"}


def _sft(i: int) -> dict:
    """v2 的：只有 role 与 content，一段一问一答，另一段两问两答。"""
    more = [{"role": "user", "content": "再见"}, {"role": "assistant", "content": f"再见，{i}！"}]
    return {"conversations": [*_turns(i), *(more if i % 2 else [])]}


def _sft_t2t(i: int) -> dict:
    """v3 的：普通的、带思考的、调用工具的混在一起；``tools`` 与 ``tool_calls`` 是 JSON 字符串。"""
    if i % 3 == 0:
        return _sft(i)
    if i % 3 == 1:
        thought = {
            "role": "assistant",
            "content": f"是{2 * i + 1}。",
            "reasoning_content": f"先算{i}加{i + 1}。",
        }
        return {"conversations": [*_ask(i), thought]}
    call = json.dumps([{"name": "calculate_math", "arguments": {"expression": f"{i}+{i + 1}"}}])
    return {
        "conversations": [
            {"role": "system", "content": "# Tools", "tools": MATH},
            *_ask(i),
            {"role": "assistant", "content": "", "tool_calls": call},
            {"role": "tool", "content": json.dumps({"result": str(2 * i + 1)})},
            {"role": "assistant", "content": f"等于{2 * i + 1}。"},
        ]
    }


def _r1(i: int) -> dict:
    answer = f"<think>\n先算{i}加{i + 1}。\n</think>\n<answer>\n是{2 * i + 1}。\n</answer>"
    return {"conversations": [*_ask(i), {"role": "assistant", "content": answer}]}


def _dpo(i: int) -> dict:
    """它的键是 content 在前、role 在后。"""
    sides = {"chosen": f"您好，等于{2 * i + 1}。", "rejected": f"哼，等于{2 * i + 1}。"}
    return {
        side: [{"content": turn["content"], "role": turn["role"]} for turn in _ask(i)]
        + [{"content": said, "role": "assistant"}]
        for side, said in sides.items()
    }


def _rlaif(blank: str):
    return lambda i: {"conversations": [*_ask(i), {"role": "assistant", "content": blank}]}


def _agent_math(i: int) -> dict:
    turns = [{"role": "system", "content": "", "tools": MATH}, *_ask(i), {"role": "assistant", "content": ""}]
    return {"conversations": turns, "gt": [str(2 * i + 1)]}


def _agent(i: int) -> dict:
    """六样工具混着，也有没有工具、``gt`` 为空的。"""
    if i % 3 == 0:
        return _agent_math(i)
    end = {"role": "assistant", "content": ""}
    if i % 3 == 1:
        return {"conversations": [{"role": "user", "content": f"写第{i}句话。"}, end], "gt": []}
    ask = {"role": "user", "content": f"北京天气，再算{i}*2"}
    return {
        "conversations": [{"role": "system", "content": "你会用工具。", "tools": MANY}, ask, end],
        "gt": ["28", str(2 * i)],
    }


ROWS = {
    "pretrain_hq": _pretrain,
    "pretrain_t2t": _pretrain,
    "pretrain_t2t_mini": _pretrain,
    "tokenizer_train": _pretrain,
    **dict.fromkeys(("sft_mini_512", "sft_512", "sft_1024", "sft_2048"), _sft),
    **dict.fromkeys(("sft_t2t", "sft_t2t_mini"), _sft_t2t),
    **dict.fromkeys(("lora_identity", "lora_medical", "lora_exam"), _sft),
    "r1_mix_1024": _r1,
    "dpo": _dpo,
    "rlaif-mini": _rlaif("无"),
    "rlaif": _rlaif(""),
    "agent_rl": _agent,
    "agent_rl_math": _agent_math,
}


def write_data(path: Path, count: int = 12) -> Path:
    """公布的名字 → 同样格式的几行。"""
    rows = (ROWS[path.stem](i) for i in range(count))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def write_weights(path: Path, use_moe: bool = False, layers: int = LAYERS) -> dict[str, torch.Tensor]:
    """照公共项目的办法存一份 ``.pth``；返回写下的状态字典。"""
    from minimind.model import MiniMindForCausalLM, preset

    torch.manual_seed(len(path.stem))
    name = "minimind3_moe" if use_moe else "minimind3"
    model = MiniMindForCausalLM(preset(name, num_hidden_layers=layers, initializer_range=0.06))
    state = {key: value.half() for key, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return state


def write_folder(folder: Path, state: dict[str, torch.Tensor], layers: int = LAYERS) -> Path:
    """``minimind-3/``：transformers 的 Qwen3，带分词器与对话模板。"""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=6400, hidden_size=768, intermediate_size=2432, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, head_dim=96, max_position_embeddings=32768, rms_norm_eps=1e-6, rope_theta=1e6,
        tie_word_embeddings=True, use_sliding_window=False,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).half()
    model.load_state_dict(state)
    model.save_pretrained(folder)
    write_tokenizer(folder, "minimind3")
    return folder


def standin(home: Path, layers: int = LAYERS) -> Path:
    """一个使用者的目录：``out/`` 里的权重、``model/`` 的分词器、``minimind-3/``。"""
    write_weights(home / "out" / "pretrain_768.pth", layers=layers)
    write_weights(home / "out" / "pretrain_768_moe.pth", use_moe=True, layers=layers)
    state = write_weights(home / "out" / "full_sft_768.pth", layers=layers)
    write_weights(home / "out" / "full_sft_768_moe.pth", use_moe=True, layers=layers)
    write_tokenizer(home / "model", "minimind3")
    write_folder(home / "minimind-3", state, layers)
    return home


def lay_out(home: Path, layers: int = LAYERS) -> Path:
    """:func:`standin`，另在 ``remote/`` 里放公布的文件，返回它；``dataset/`` 里只有不靠下载命令的一个。"""
    standin(home, layers)
    for folder in (home / "remote", home / "dataset"):
        folder.mkdir(exist_ok=True)
    for name in ROWS:
        write_data(home / "remote" / f"{name}.jsonl")
    write_data(home / "dataset" / "lora_medical.jsonl")
    return home / "remote"


class Hub(ThreadingHTTPServer):
    """扮演魔搭上它的数据集：列清单，给文件；``with`` 里开着。"""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.url = folder, f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *error) -> None:
        self.shutdown()
        super().__exit__(*error)


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        url, folder = urlparse(self.path), self.server.folder
        if url.path.endswith("/repo/tree"):
            files = [(path.name, path.read_bytes()) for path in sorted(folder.glob("*.jsonl"))]
            entries = [
                {"Path": name, "Size": len(data), "Sha256": hashlib.sha256(data).hexdigest(), "Type": "blob"}
                for name, data in files
            ]
            body = json.dumps({"Code": 200, "Data": {"Files": entries}}).encode()
        else:
            body = (folder / parse_qs(url.query)["FilePath"][0]).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
