"""GGUF：再读出来的权重、元数据、分词器与我们的一致；别的实现打开它 logits 相同。"""

from __future__ import annotations

import json
import re
import unicodedata

import numpy as np
import pytest
import torch

from minimind.distribution import install_command
from minimind.errors import UserError
from minimind.export import gguf as gguf_module
from minimind.export.cli import main_gguf, main_import
from minimind.export.gguf import export_gguf, interleave_rope_rows
from minimind.export.gguf_tokenizer import pre_tokenizer_name
from minimind.export.hf import write_tokenizer
from minimind.export.layouts import hf_config
from minimind.export.ollama import modelfile
from minimind.tokenizer import load_tokenizer
from minimind.tokenizer.render import TOOLS_HEAD

gguf = pytest.importorskip("gguf", reason=f"没有安装 gguf：{install_command('export')}")


def read(path):
    reader = gguf.GGUFReader(str(path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


@pytest.mark.parametrize(
    ("kind", "arch"), [("v2", "llama"), ("v2_untied", "llama"), ("v3", "qwen3"), ("v3_moe", "qwen3moe")]
)
@pytest.mark.compat
def test_f32_由_transformers_打开后_logits_相同(make_source, tmp_path, ids, kind, arch):
    from packaging.version import InvalidVersion
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import is_gguf_available

    try:
        recognised = is_gguf_available()
    except InvalidVersion:  # transformers 5.0 在 Python 3.10 上问不出 gguf 的版本
        recognised = False
    if not recognised:
        pytest.skip("这里的 transformers 认不出装着的 gguf，读不了")
    source, ours = make_source(kind)
    assert export_gguf(source, tmp_path / "m.gguf", "f32") == arch
    options = {}
    if arch != "llama":  # transformers 5 读 qwen3 的 GGUF 时不看每个头的维数与专家宽度，要另外告诉它
        options["config"] = AutoConfig.for_model(**hf_config(source.config, torch.float32))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, **options
    ).eval()
    with torch.no_grad():
        expected, logits = ours(ids).logits, theirs(ids).logits
    assert expected.std() > 0.5
    assert (logits - expected).abs().max() < 1e-4


def test_旋转的行序_相邻两维成对后点积不变():
    torch.manual_seed(0)
    heads, dim, hidden, angle = 3, 8, 5, torch.rand(4)
    weight, x = torch.randn(heads * dim, hidden), torch.randn(hidden)
    halves = (weight @ x).view(heads, 2, dim // 2)  # 我们：第 i 维与第 i+D/2 维成对
    pairs = (interleave_rope_rows(weight, dim) @ x).view(heads, dim // 2, 2)  # llama.cpp：相邻两维成对
    ours = torch.view_as_complex(halves.transpose(1, 2).contiguous()) * torch.polar(torch.ones(4), angle)
    theirs = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones(4), angle)
    torch.testing.assert_close(ours, theirs)


def test_元数据与张量齐全(make_source, tmp_path):
    source, ours = make_source("v2_head_dim")
    export_gguf(source, tmp_path / "m.gguf", "f16")
    fields, tensors = read(tmp_path / "m.gguf")
    config = ours.config
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.vocab_size": 6400,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": load_tokenizer().chat_template,
    }
    assert {key: fields[key] for key in expected} == expected
    assert fields["llama.rope.freq_base"] == pytest.approx(1e6)
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert "llama.rope.scaling.type" not in fields
    assert len(tensors) == len(source.state) and "output.weight" not in tensors
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert {types[name] for name in types if "norm" in name} == {"F32"}
    assert {types[name] for name in types if "norm" not in name} == {"F16"}


def test_词表_类型_合并与分词器逐项相同(make_source, tmp_path):
    source, _ = make_source("v2", vocab_size=6410)
    export_gguf(source, tmp_path / "m.gguf", "f16")
    fields, _ = read(tmp_path / "m.gguf")
    tokenizer = load_tokenizer()
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[:6400] == tokenizer.convert_ids_to_tokens(range(6400))
    assert types[:3] == [gguf.TokenType.CONTROL] * 3  # 生成时不显示
    assert types[3:11] == [gguf.TokenType.USER_DEFINED] * 8  # 标签要留给对话程序解析
    assert types[11:16] == [gguf.TokenType.CONTROL] * 5
    assert set(types[16:6400]) == {gguf.TokenType.NORMAL}
    assert types[6400:] == [gguf.TokenType.UNUSED] * 10 and tokens[6400] == "[PAD6400]"
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(merge) for merge in model["merges"]]


@pytest.mark.parametrize(
    ("kind", "normalised", "shared"),
    [
        ("v2_moe", True, 1),
        ("v2_moe_two_shared", True, 2),
        ("v2_moe_top1", False, 1),
        ("v2_moe_unnormalised", False, 1),
    ],
)
def test_v2_混合专家是_bailingmoe_元数据与每个张量都对(make_source, tmp_path, kind, normalised, shared):
    source, ours = make_source(kind)
    assert export_gguf(source, tmp_path / "m.gguf", "f32") == "bailingmoe"
    fields, tensors = read(tmp_path / "m.gguf")
    config, prefix = ours.config, "bailingmoe."
    expected = {
        "leading_dense_block_count": 0,
        "expert_count": 4,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": shared,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_weights_norm": normalised,
        "expert_weights_scale": 1.0,
    }
    assert {key: fields[prefix + key] for key in expected} == expected
    width, state = config.moe_intermediate_size, source.state
    array = {name: torch.from_numpy(tensor.data.copy()) for name, tensor in tensors.items()}
    mlp = "model.layers.1.mlp."
    for i in range(shared):  # 几个共享专家首尾相接
        rows = slice(i * width, (i + 1) * width)
        original = {
            name: state[f"{mlp}shared_experts.{i}.{name}_proj.weight"] for name in ("gate", "up", "down")
        }
        assert torch.equal(array["blk.1.ffn_gate_shexp.weight"][rows], original["gate"])
        assert torch.equal(array["blk.1.ffn_up_shexp.weight"][rows], original["up"])
        assert torch.equal(array["blk.1.ffn_down_shexp.weight"][:, rows], original["down"])
    for i in range(4):
        assert torch.equal(
            array["blk.1.ffn_down_exps.weight"][i], state[f"{mlp}experts.{i}.down_proj.weight"]
        )
    assert torch.equal(array["output.weight"], state["model.embed_tokens.weight"])  # 它不认共享的输出头
    q = interleave_rope_rows(state["model.layers.0.self_attn.q_proj.weight"], config.head_dim)
    assert torch.equal(array["blk.0.attn_q.weight"], q)
    assert len(tensors) == 3 + 2 * (
        6 + 1 + 6
    )  # 嵌入、末尾归一化、输出头；每层：注意力与归一化、路由、两种专家


def test_q8_0_每组误差不超过半格(make_source, tmp_path):
    source, _ = make_source("v3_moe")
    export_gguf(source, tmp_path / "m.gguf", "q8_0")
    _, tensors = read(tmp_path / "m.gguf")
    types = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert types["blk.0.ffn_gate_inp.weight"] == "F32"  # 路由差一点就换专家
    assert types["token_embd.weight"] == types["blk.1.ffn_down_exps.weight"] == "Q8_0"
    tensor = tensors["blk.1.ffn_down_exps.weight"]
    names = [f"model.layers.1.mlp.experts.{i}.down_proj.weight" for i in range(4)]
    original = torch.stack([source.state[name] for name in names]).numpy()
    restored = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(original.shape)
    blocks, error = original.reshape(-1, 32), np.abs(restored - original).reshape(-1, 32)
    step = np.abs(blocks).max(1, keepdims=True) / 127
    assert (error <= 0.5 * step + 1e-3 * np.abs(blocks).max()).all()
    assert error.max() > 0


def test_外推写进元数据_先除掉_llama_cpp_自己乘的系数(make_source, tmp_path):
    source, _ = make_source("v3", inference_rope_scaling=True)
    export_gguf(source, tmp_path / "m.gguf", "f16")
    fields, _ = read(tmp_path / "m.gguf")
    prefix = "qwen3.rope.scaling."
    assert fields[f"{prefix}type"] == "yarn" and fields[f"{prefix}factor"] == 16
    assert fields[f"{prefix}original_context_length"] == 2048
    # llama.cpp：attn_factor · (1 + 0.1·ln factor) 就是乘在 cos、sin 上的
    assert fields[f"{prefix}attn_factor"] * (1 + 0.1 * np.log(16)) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "overrides", "word"),
    [
        ("v2_moe", {"n_shared_experts": 0}, "共享专家"),
        ("v3_moe", {"n_shared_experts": 1}, "共享专家"),
        ("v3_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
    ],
)
def test_没有同构结构时说清楚_不留文件(make_source, tmp_path, kind, overrides, word):
    source, _ = make_source(kind, **overrides)
    with pytest.raises(UserError, match=f"{word}.*export hf"):
        export_gguf(source, tmp_path / "m.gguf", "f16")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_已有文件不覆盖_出错不动它(make_source, tmp_path, capsys, monkeypatch):
    source, _ = make_source("v2")
    path = tmp_path / "m.gguf"
    path.write_text("旧的")
    arguments = ["tiny", str(path), "--save_dir", str(tmp_path / "out")]
    assert main_gguf(arguments) == 2
    assert "--force" in capsys.readouterr().err

    def broken(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf_module, "write_tokenizer", broken)
        with pytest.raises(UserError, match="原有的内容未动"):
            export_gguf(source, path, "f16", force=True)
    assert path.read_text() == "旧的" and sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "out"]
    assert main_gguf([*arguments, "--force", "--type", "q8_0"]) == 0
    assert path.read_bytes()[:4] == b"GGUF"
    assert (tmp_path / "m.Modelfile").read_text("utf-8").startswith("FROM ./m.gguf\n")


def test_没装_gguf_时说要装哪个(make_source, tmp_path, monkeypatch):
    source, _ = make_source("v2")

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(gguf_module.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"pip install -e '\.\[export\]'"):
        export_gguf(source, tmp_path / "m.gguf", "f16")


def test_别的分词器_认得的给名字_不认得的报错():
    spec = json.loads(load_tokenizer().backend_tokenizer.to_str())
    assert pre_tokenizer_name(spec, "x") == "qwen2"
    # 公共 MiniMind 的分词器：只有一步 ByteLevel，用它自带的 GPT-2 正则
    gpt2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    assert pre_tokenizer_name({**spec, "pre_tokenizer": gpt2}, "x") == "gpt-2"
    for change in (
        {"pre_tokenizer": {**gpt2, "add_prefix_space": True}},
        {"pre_tokenizer": {"type": "Metaspace"}},
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}},
        {"model": {**spec["model"], "type": "Unigram"}},
    ):
        with pytest.raises(UserError, match=r"^x：.*llama\.cpp 没有一样的"):
            pre_tokenizer_name({**spec, **change}, "x")


def nfc_tokenizer(folder):
    """像 Qwen3 那样先做 NFC 的分词器目录：词表与预切分是我们的。"""
    tokenizer = load_tokenizer()
    write_tokenizer(tokenizer, folder)
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    spec["normalizer"] = {"type": "NFC"}
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), "utf-8")
    return folder


def test_导入的_Qwen3_先做_NFC_的分词器也能导出_说一句(tmp_path, capsys):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path / "qwen"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(vocab_size=6400, intermediate_size=128, head_dim=16, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    nfc_tokenizer(folder)
    out = str(tmp_path / "out")
    assert main_import([str(folder), "--name", "qwen", "--save_dir", out]) in (None, 0)
    options = ["--save_dir", out, "--tokenizer_path", str(folder)]
    assert main_gguf(["qwen", str(tmp_path / "m.gguf"), *options]) in (None, 0)
    assert "NFC" in capsys.readouterr().err
    fields, _ = read(tmp_path / "m.gguf")
    assert fields["general.architecture"] == "qwen3" and fields["tokenizer.ggml.pre"] == "qwen2"
    theirs, plain = load_tokenizer(folder), load_tokenizer()  # llama.cpp 编的就是不做 NFC 的那一种
    text = "你好，café naïve 한국어 ｱ ﬁ ① が"
    assert unicodedata.is_normalized("NFC", text)
    assert theirs(text)["input_ids"] == plain(text)["input_ids"]
    split = unicodedata.normalize("NFD", text)
    assert theirs(split)["input_ids"] == theirs(text)["input_ids"] != plain(split)["input_ids"]


def test_Modelfile_的布局与停止符(make_source):
    source, _ = make_source("v2")
    text = modelfile(source, "m.gguf")
    assert 'PARAMETER stop "<|im_end|>"' in text and "@" not in text
    template = re.search(r'TEMPLATE """(.*)"""', text, re.DOTALL)[1]
    assert f"{TOOLS_HEAD}{{{{ range" in template  # 工具说明后面恰好一个换行
    opened = len(re.findall(r"{{-? ?(?:if|range)\b", template))
    assert opened == len(re.findall(r"{{-? ?end\b", template))
    source.plain = True  # 预训练权重只会续写，不套对话模板
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile(source, "m.gguf")


def test_llama_cpp_的贪心文本与我们相同(make_source, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="没有安装 llama-cpp-python")
    for kind in ("v2", "v3", "v3_moe", "v2_moe", "v2_moe_two_shared"):
        source, ours = make_source(kind)
        export_gguf(source, tmp_path / f"{kind}.gguf", "f32")
        theirs = llama_cpp.Llama(str(tmp_path / f"{kind}.gguf"), n_ctx=64, n_threads=1, verbose=False)
        text = "<|im_start|>user\n你好，3 加 25 等于几？<|im_end|>\n<|im_start|>assistant\n"
        ids = theirs.tokenize(text.encode(), add_bos=False, special=True)
        assert ids == load_tokenizer()(text)["input_ids"]
        expected = ours.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :]
        got = []
        for token in theirs.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0):
            got.append(token)
            if len(got) == len(expected):
                break
        assert got == expected.tolist()
