"""Hugging Face 目录：别人打开它，logits 与对话模板都和我们的一样。"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import other_models
import pytest
import torch
from export_helpers import save_small
from other_models import QWEN
from transformers import AutoModelForCausalLM, AutoTokenizer

from minimind.errors import UserError
from minimind.export import hf
from minimind.export.cli import main_hf
from minimind.export.hf import export_hf, write_tokenizer
from minimind.export.source import open_source
from minimind.inference.loading import load_for_inference
from minimind.model.model_lora import apply_lora, lora_layers, lora_state_dict
from minimind.tokenizer import encode_chat, load_tokenizer

TOOL = {
    "type": "function",
    "function": {"name": "查天气", "description": "查某地的天气", "parameters": {"type": "object"}},
}
CALL = {"function": {"name": "查天气", "arguments": {"城市": "北京", "days": 2}}}
CONVERSATIONS = {
    "一问": [{"role": "user", "content": "你好，3 加 25 等于几？"}],
    "系统提示与多轮": [
        {"role": "system", "content": "你是一个助手。"},
        {"role": "user", "content": "Hello, what's 12*7?\n请用中文答。"},
        {"role": "assistant", "content": "84。"},
        {"role": "user", "content": "再加 1 呢"},
    ],
    "思考": [
        {"role": "user", "content": "想一想"},
        {"role": "assistant", "reasoning_content": "先算 1+1。\n得 2。", "content": "<answer>2</answer>"},
        {"role": "user", "content": "好"},
        {"role": "assistant", "reasoning_content": "", "content": "嗯。"},
    ],
    "工具": [
        {"role": "user", "content": "北京和上海天气"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": '{"温度": 21.5}'},
        {"role": "tool", "content": "晴"},
        {"role": "assistant", "content": "晴，21.5 度。"},
    ],
}


@torch.no_grad()
def logits_of(folder, ids, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return model, model(ids).logits


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("v2", "LlamaForCausalLM"),
        ("v2_head_dim", "LlamaForCausalLM"),
        ("v2_untied", "LlamaForCausalLM"),
        ("v3", "Qwen3ForCausalLM"),
        ("v3_moe", "Qwen3MoeForCausalLM"),
        ("v3_moe_top2", "Qwen3MoeForCausalLM"),
        ("v2_moe", "Qwen2MoeForCausalLM"),
        ("v2_moe_two_shared", "Qwen2MoeForCausalLM"),
        ("v2_moe_top1", "Qwen2MoeForCausalLM"),
        ("v2_moe_unnormalised", "Qwen2MoeForCausalLM"),
    ],
)
@pytest.mark.compat
def test_公开的类打开后_logits_与贪心都相同(make_source, tmp_path, ids, kind, name):
    source, ours = make_source(kind)
    export_hf(source, tmp_path / "hf", torch.float32)
    theirs, logits = logits_of(tmp_path / "hf", ids)
    assert type(theirs).__name__ == name and type(theirs).__module__.startswith("transformers.")
    with torch.no_grad():
        expected = ours(ids).logits
    assert expected.std() > 0.5  # 权重真的起作用，相等才有意义
    assert (logits - expected).abs().max() < 1e-4
    greedy = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(theirs.generate(ids, **greedy), ours.generate(ids, **greedy))


REMOTE = """
import sys
sys.modules["minimind"] = None  # 装着也引用不了
import torch
from transformers import AutoConfig, AutoModelForCausalLM
folder, ids = sys.argv[1], torch.load(sys.argv[2])
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert type(config).__module__.startswith("transformers_modules.") and config.n_shared_experts == 1
for open_it in (
    lambda: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
    lambda: AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=True),
):
    model = open_it().eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
text = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
torch.save((model(ids).logits.detach(), text), sys.argv[3])
"""


@pytest.mark.compat
def test_要本项目的结构就带着模型文件_没装本项目也能打开(make_source, tmp_path, ids):
    _, ours = make_source("v2_moe")
    assert main_hf(
        ["tiny", str(tmp_path / "hf"), "--save_dir", str(tmp_path / "out"), "--dtype", "float32"]
        + ["--layout", "minimind"]
    ) in (None, 0)
    files = {"model_minimind.py", "kernels.py", "cpu_attention.py", "hf.py"}
    assert {p.name for p in (tmp_path / "hf").glob("*.py")} == files
    here = load_for_inference(load_from=str(tmp_path / "hf"), device="cpu", dtype="float32").model
    assert type(here) is type(ours)  # 装了本项目时用自己的类，不执行目录里的代码
    torch.save(ids, tmp_path / "ids.pt")
    names = [str(tmp_path / name) for name in ("hf", "ids.pt", "out.pt")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HOME": str(tmp_path / "home")
    }
    (tmp_path / "别处").mkdir()
    subprocess.run(
        [sys.executable, "-I", "-c", REMOTE, *names],
        check=True, cwd=tmp_path / "别处", timeout=300, env=environment,
    )  # fmt: skip
    copied = {p.name for p in (tmp_path / "home" / "modules" / "transformers_modules").rglob("*.py")}
    assert files <= copied
    logits, text = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        expected = ours(ids).logits
        assert torch.equal(here(ids).logits, expected)
    assert (logits - expected).abs().max() < 1e-4
    kw = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(text, ours.generate(ids, **kw))


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [("v2_moe", {"n_shared_experts": 0}), ("v2_moe", {"head_dim": 32}), ("v3_moe", {"n_shared_experts": 1})],
)
def test_没有同构的公开结构_才带模型文件(make_source, tmp_path, ids, kind, overrides):
    source, ours = make_source(kind, **overrides)
    assert export_hf(source, tmp_path / "hf", torch.float32) == "minimind"
    assert (tmp_path / "hf" / "model_minimind.py").is_file()
    here = load_for_inference(load_from=str(tmp_path / "hf"), device="cpu", dtype="float32").model
    with torch.no_grad():
        assert torch.equal(here(ids).logits, ours(ids).logits)


def test_共享专家的门是零_down_是两倍_偏置是零(make_source, tmp_path):
    from safetensors.torch import load_file

    source, _ = make_source("v2_moe")
    export_hf(source, tmp_path / "hf", torch.float16)
    written = load_file(tmp_path / "hf" / "model.safetensors")
    mlp = "model.layers.1.mlp."
    assert not any(".py" in path.name for path in (tmp_path / "hf").iterdir()), "不需要模型文件"
    assert written[f"{mlp}shared_expert_gate.weight"].tolist() == [[0.0] * 64]
    assert written["model.layers.0.self_attn.k_proj.bias"].tolist() == [0.0] * 32
    original = source.state[f"{mlp}shared_experts.0.down_proj.weight"]
    assert torch.equal(written[f"{mlp}shared_expert.down_proj.weight"].float(), 2 * original)


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.compat
def test_对话模板渲染出同样的_id(exported_tokenizer, name, thinking):
    ours, messages = load_tokenizer(), CONVERSATIONS[name]
    tools = [TOOL] if name == "工具" else None
    for prompt in (False, True):
        theirs = exported_tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=prompt,
            return_dict=False,
            **({} if thinking is None else {"enable_thinking": thinking}),
        )
        assert theirs == encode_chat(ours, messages, tools, prompt, thinking).ids


@pytest.fixture(scope="module")
def exported_tokenizer(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizer")
    save_small(root / "out", "v2")
    export_hf(open_source("tiny", str(root / "out")), root / "hf", torch.float16)
    config = json.loads((root / "hf" / "tokenizer_config.json").read_text("utf-8"))
    assert config["chat_template"] == (root / "hf" / "chat_template.jinja").read_text("utf-8")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4.x 也认识的名字
    return AutoTokenizer.from_pretrained(root / "hf")


def test_几份有名字的模板都带上(tmp_path):
    templates = {"default": QWEN, "tool_use": QWEN.replace("# Tools", "# 会用的工具")}
    other_models.write_tokenizer(
        tmp_path / "a", "qwen", [{"name": name, "template": text} for name, text in templates.items()]
    )
    before = load_tokenizer(tmp_path / "a")
    (tmp_path / "b").mkdir()
    write_tokenizer(before, tmp_path / "b")
    after = load_tokenizer(tmp_path / "b")
    assert after.chat_template == before.chat_template == templates
    for tools in (None, [TOOL]):
        messages = [{"role": "user", "content": "问"}]
        ids = encode_chat(after, messages, tools, True).ids
        assert ids == encode_chat(before, messages, tools, True).ids
        assert ("会用的工具" in after.decode(ids)) == bool(tools)


def test_结束符与特殊_token_写在配置里(exported_tokenizer, make_source, tmp_path):
    assert exported_tokenizer.convert_ids_to_tokens([0, 1, 2]) == [
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ]
    assert (exported_tokenizer.pad_token_id, exported_tokenizer.eos_token_id) == (0, 2)
    text = "<think>\n好</think><|im_end|>"
    encoded = exported_tokenizer(text)["input_ids"]
    assert encoded[0] == 3 and encoded[-1] == 2  # 标签与控制 token 都是一个 id，前面不加 bos
    assert exported_tokenizer.decode(encoded, skip_special_tokens=True) == "<think>\n好</think>"
    source, _ = make_source("v2")
    export_hf(source, tmp_path / "hf", torch.float16)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == [2]


@pytest.fixture
def stretched(make_source, tmp_path):
    """``stretched("v2")`` → 开着 YaRN 的原模型；目录在 ``tmp_path / "yarn"``。"""

    def make(kind: str, **yarn):
        _, ours = make_source(kind, **({"rope_scaling": yarn} if yarn else {}))
        source = open_source("tiny", str(tmp_path / "out"), inference_rope_scaling=True)
        export_hf(source, tmp_path / "yarn", torch.float32)
        scaled = type(ours)(source.config).eval()
        scaled.load_state_dict(ours.state_dict())
        return scaled, ours

    return make


LONG = torch.randint(20, 6400, (1, 2200), generator=torch.Generator().manual_seed(5))  # 过了原窗口 2048


@pytest.mark.parametrize("kind", ["v2", "v3", "v2_moe"])
def test_外推写进配置后_过了原窗口_logits_相同_不开就不写(make_source, stretched, tmp_path, kind):
    scaled, ours = stretched(kind)
    source = open_source("tiny", str(tmp_path / "out"))
    export_hf(source, tmp_path / "plain", torch.float32)
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["rope_scaling"] is None
    with torch.no_grad():
        expected, plain = scaled(LONG).logits, ours(LONG).logits
    _, logits = logits_of(tmp_path / "yarn", LONG)
    assert (expected - plain).abs().max() > 1e-2
    assert (logits - expected).abs().max() < 1e-4


def vllm_rope(rope, dim: int, newer: bool) -> tuple[torch.Tensor, float]:
    """vLLM 的 YaRN 读配置算出的角频率 ``[D/2]`` 与乘在 cos、sin 上的系数，照它的定义另写一遍。

    发布过的版本只读 ``attn_factor``，乘 ``(1 + 0.1·ln s)·attn_factor``；新的有 ``attention_factor`` 就只用它。
    """
    scale, window = rope["factor"], rope["original_max_position_embeddings"]
    default = 1.0 if scale <= 1 else 0.1 * math.log(scale) + 1.0
    mscale = rope["attention_factor"] if newer else default * rope.get("attn_factor", 1.0)
    ends = [
        dim * math.log(window / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))
        for turns in (rope["beta_fast"], rope["beta_slow"])
    ]
    low, high = max(math.floor(ends[0]), 0), min(math.ceil(ends[1]), dim - 1)
    wave = rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
    keep = 1 - ((torch.arange(dim // 2, dtype=torch.float) - low) / max(high - low, 1e-3)).clamp(0, 1)
    return (1 - keep) / (scale * wave) + keep / wave, mscale


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("yarn", [{}, {"factor": 8.0, "attention_factor": 1.1}])
def test_外推_vLLM_的公式读同一份配置_过了原窗口_logits_也相同(stretched, tmp_path, yarn, newer):
    scaled, _ = stretched("v3", **yarn)
    raw = json.loads((tmp_path / "yarn" / "config.json").read_text())
    theirs, _ = logits_of(tmp_path / "yarn", LONG[:, :4])
    rotary = theirs.model.rotary_emb
    for place in (raw["rope_parameters"], {**raw["rope_scaling"], "rope_theta": raw["rope_theta"]}):
        rotary.inv_freq, rotary.attention_scaling = vllm_rope(place, raw["head_dim"], newer)
        with torch.no_grad():
            expected, logits = scaled(LONG).logits, theirs(LONG).logits
        assert (logits - expected).abs().max() < 1e-4
    rotary.attention_scaling *= 1.05  # 系数差一点就看得出来
    with torch.no_grad():
        assert (theirs(LONG).logits - expected).abs().max() > 1e-3


def test_外推参数与公开实现算出的频率不同时报错(make_source, tmp_path):
    yarn = {"factor": 4.0, "original_max_position_embeddings": 2**26, "beta_fast": 1e4, "beta_slow": 1e-3}
    source, _ = make_source("v2", inference_rope_scaling=True, rope_scaling=yarn)
    with pytest.raises(UserError, match="过渡带"):
        export_hf(source, tmp_path / "hf", torch.float32)
    assert not (tmp_path / "hf").exists()


def test_精度_auto_与权重文件逐位相同(make_source, tmp_path):
    from safetensors.torch import load_file

    make_source("v2")
    assert main_hf(["tiny", str(tmp_path / "hf"), "--save_dir", str(tmp_path / "out")]) == 0
    stored = torch.load(tmp_path / "out" / "tiny_64.pth", weights_only=True)
    written = load_file(tmp_path / "hf" / "model.safetensors")
    assert set(stored) - set(written) == {"lm_head.weight"}
    assert all(value.dtype == torch.float16 and torch.equal(value, stored[k]) for k, value in written.items())
    arguments = ["tiny", str(tmp_path / "b"), "--save_dir", str(tmp_path / "out"), "--dtype", "bfloat16"]
    assert main_hf(arguments) == 0
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_先合并_LoRA_再导出_与带着_LoRA_算的相同(tmp_path, ids):
    model = save_small(tmp_path / "out", "v2")
    with torch.no_grad():
        plain = model(ids).logits
    apply_lora(model, 4, 4.0)
    for layer in lora_layers(model).values():
        torch.nn.init.normal_(layer.lora.B.weight, std=0.2)
    (tmp_path / "out" / "lora").mkdir()
    torch.save(lora_state_dict(model), tmp_path / "out" / "lora" / "extra_64.pth")
    arguments = ["tiny", str(tmp_path / "hf"), "--save_dir", str(tmp_path / "out"), "--dtype", "float32"]
    assert main_hf([*arguments, "--lora_weight", "extra"]) == 0
    _, logits = logits_of(tmp_path / "hf", ids)
    with torch.no_grad():
        expected = model(ids).logits
    assert (expected - plain).abs().max() > 0.1
    assert (logits - expected).abs().max() < 1e-4


def test_转不下的值是错误而不是_inf(make_source, tmp_path):
    source, _ = make_source("v2")
    source.state["model.norm.weight"][3] = 1e6
    with pytest.raises(UserError, match=r"model\.norm\.weight.*1e\+06.*bfloat16"):
        export_hf(source, tmp_path / "hf", torch.float16)
    source.state["model.norm.weight"][3] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        export_hf(source, tmp_path / "hf", torch.float32)


def test_中途出错什么也不留下_已有目录原样(make_source, tmp_path, monkeypatch):
    source, _ = make_source("v2")
    export_hf(source, tmp_path / "hf", torch.float16)
    before = {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()}

    def broken(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "write_tokenizer", broken)
    for folder in ("hf", "new"):
        with pytest.raises(UserError, match="原有的内容未动"):
            export_hf(source, tmp_path / folder, torch.float32, force=True)
    assert {p.name: p.read_bytes() for p in (tmp_path / "hf").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_不加_force_不覆盖_有别的文件时加了也不(make_source, tmp_path):
    source, _ = make_source("v2")
    export_hf(source, tmp_path / "hf", torch.float16)
    with pytest.raises(UserError, match="--force"):
        export_hf(source, tmp_path / "hf", torch.float32)
    export_hf(source, tmp_path / "hf", torch.float32, force=True)
    assert '"float32"' in (tmp_path / "hf" / "config.json").read_text()
    (tmp_path / "hf" / "笔记.txt").write_text("重要")
    with pytest.raises(UserError, match=r"笔记\.txt"):
        export_hf(source, tmp_path / "hf", torch.float16, force=True)
    assert (tmp_path / "hf" / "笔记.txt").read_text() == "重要"


def test_找不到权重时说清楚(tmp_path, capsys):
    assert main_hf(["nothing", str(tmp_path / "hf"), "--save_dir", str(tmp_path)]) == 2
    assert "nothing_512.pth" in capsys.readouterr().err
    (tmp_path / "odd.pth").write_bytes(b"")
    assert main_hf([str(tmp_path / "odd.pth"), str(tmp_path / "hf")]) == 2
    assert "minimind import" in capsys.readouterr().err
