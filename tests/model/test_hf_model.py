"""与 transformers 的分界：随版本变的东西只在 hf.py；绑定与初始化归自己；输出的每个名字都答应。"""

from __future__ import annotations

import ast
import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import DynamicCache

import minimind
from minimind.model import MiniMindConfig, MiniMindForCausalLM, MiniMindLM, count_parameters, preset
from minimind.model.hf import HFOutput

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.arange(3, 27).view(2, 12)
SIZES = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=97)


def make(seed: int = 0, kind: type = MiniMindForCausalLM, **extra):
    torch.manual_seed(seed)
    return kind(MiniMindConfig(**(SIZES | extra))).eval()


def tied(model) -> bool:
    return model.lm_head.weight is model.model.embed_tokens.weight


# ---------------------------------------------------------------- 谁引用 transformers

PACKAGE = Path(minimind.__file__).parent
# 除了 hf.py，只许：配置的基类与登记、读别家的模型与分词器、标出版本
ALLOWED = {
    "model/hf.py": {"AutoModelForCausalLM", "DynamicCache", "GenerationMixin", "PreTrainedModel"},
    "model/model_minimind.py": {"AutoConfig", "PretrainedConfig"},
    "runtime/checkpoint.py": {"PretrainedConfig"},
    "selftest/show.py": {"transformers"},
}
LOADERS = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification",
           "AutoTokenizer", "PreTrainedTokenizerFast"}  # fmt: skip


def imported_from_transformers(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.ImportFrom)
            and not node.level
            and node.module.split(".")[0] == "transformers"
        ):
            inner = node.module.partition(".")[2]  # 只从顶层取：里面的模块搬家最多
            found |= {f"{inner}.{a.name}" if inner else a.name for a in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.split(".")[0] == "transformers"}
    return found


def test_只有_hf_py_与读别家模型的地方引用_transformers():
    wrong = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        extra = imported_from_transformers(path) - ALLOWED.get(name, LOADERS)
        if extra:
            wrong[name] = extra
    assert not wrong, "这些名字随 transformers 的版本变，请经 minimind/model/hf.py 用"
    assert imported_from_transformers(PACKAGE / "model/hf.py") == ALLOWED["model/hf.py"]  # 这个检查真的看得见


# ---------------------------------------------------------------- 绑定

SAME = dict(
    初始化=lambda m, _: m,
    存盘再读=lambda m, folder: (m.save_pretrained(folder), type(m).from_pretrained(folder))[1],
    半精度读入=lambda m, folder: (
        m.save_pretrained(folder),
        type(m).from_pretrained(folder, dtype=torch.bfloat16),
    )[1],
    load_state_dict=lambda m, _: (m.load_state_dict(make(1).state_dict()), m)[1],
    load_state_dict_assign=lambda m, _: (m.load_state_dict(make(1).state_dict(), assign=True), m)[1],
    只有词嵌入_assign=lambda m, _: (
        m.load_state_dict({k: v for k, v in m.state_dict().items() if k != HEAD}, strict=False, assign=True),
        m,
    )[1],
    to=lambda m, _: m.to(torch.float64),
    deepcopy=lambda m, _: copy.deepcopy(m),
    half=lambda m, _: m.half(),
    to_empty=lambda m, _: m.to("meta").to_empty(device="cpu"),
    pickle=lambda m, _: pickle.loads(pickle.dumps(m)),
)


@pytest.mark.parametrize("how", SAME)
@pytest.mark.compat
def test_绑定在各种操作之后仍在(how, tmp_path):
    model = SAME[how](make(), tmp_path)
    assert tied(model)
    model.check_tied()
    assert count_parameters(model) == 97 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192 + 2 * 64) + 64
    assert [n for n, p in model.named_parameters() if p is model.lm_head.weight] == [EMBEDDING]


@pytest.mark.parametrize("how", [h for h in SAME if "读" not in h])
def test_只用_torch_的核心绑定也在(how):
    assert tied(SAME[how](make(kind=MiniMindLM), None))


def test_不绑定的配置各有各的参数_存盘再读也是(tmp_path):
    model = make(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    loaded = MiniMindForCausalLM.from_pretrained(tmp_path)
    assert not tied(model) and not tied(loaded) and not tied(copy.deepcopy(loaded))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)


def test_被人拆开的绑定是错误(monkeypatch):
    model = make()
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(RuntimeError, match="不是同一个参数"):
        model.check_tied()
    together = make(tie_word_embeddings=False)
    together.tie()
    with pytest.raises(RuntimeError, match="是同一个参数，而 tie_word_embeddings=False"):
        together.check_tied()
    monkeypatch.setattr(MiniMindLM, "tie", lambda self: None)
    for kind in (MiniMindLM, MiniMindForCausalLM):
        with pytest.raises(RuntimeError, match="不是同一个参数"):
            make(kind=kind)


@pytest.mark.compat
def test_文件里两份共享的权重不相等是错误(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {name: value.clone() for name, value in load_file(path).items()}  # 不留着文件的映射：下面要改写它
    assert HEAD not in state  # 存盘只写一份
    save_file(state | {HEAD: state[EMBEDDING] + 1}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="不相等"):
        MiniMindForCausalLM.from_pretrained(tmp_path)
    for assign in (False, True):
        with pytest.raises(ValueError, match="不相等"):
            make().load_state_dict(load_file(path), assign=assign)

    both = state | {HEAD: state[EMBEDDING].clone()}
    head_only = {k: v for k, v in state.items() if k != EMBEDDING} | {HEAD: state[EMBEDDING]}
    for written in (both, head_only):  # 读回的可能还映射着文件，看完再改写它
        save_file(written, path, metadata={"format": "pt"})
        loaded = MiniMindForCausalLM.from_pretrained(tmp_path)
        assert tied(loaded) and torch.equal(loaded.lm_head.weight, state[EMBEDDING])


@pytest.mark.compat
def test_权重文件缺了一层是错误而不是随机补上(tmp_path):
    make().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = {name: value.clone() for name, value in load_file(path).items()}
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"缺 1 个，例如 model\.layers\.1\.mlp\.up_proj\.weight"):
        MiniMindForCausalLM.from_pretrained(tmp_path)


# ---------------------------------------------------------------- 初始化

# 种子 42：各权重的和与最后三个数，由绑定与初始化还靠 transformers 5.23 时的代码算出
# fmt: off
INITIAL = {
    "small": {
        "model.embed_tokens.weight": (-29.046488, [-0.02824438, 0.00035042, -0.00356106]),
        "model.layers.0.self_attn.q_proj.weight": (1.672649, [-0.01109146, 0.00829008, -0.02134443]),
        "model.layers.1.mlp.down_proj.weight": (-1.287655, [0.00726122, -0.02055488, -0.02483944]),
        "lm_head.weight": (-29.046488, [-0.02824438, 0.00035042, -0.00356106]),
    },
    "small_zero": {
        "model.embed_tokens.weight": (-7.261622, [-0.00706109, 8.76e-05, -0.00089026]),
        "model.layers.0.self_attn.q_proj.weight": (1.672649, [-0.01109146, 0.00829008, -0.02134443]),
        "model.layers.1.self_attn.o_proj.weight": (0.000000, [0.0, 0.0, 0.0]),
        "model.layers.1.mlp.down_proj.weight": (0.000000, [0.0, 0.0, 0.0]),
    },
    "moe_v3": {
        "model.embed_tokens.weight": (24.856083, [0.01613713, -0.00152642, -0.01582552]),
        "model.layers.0.mlp.gate.weight": (-1.581781, [-0.01397636, -0.00242196, 0.01495345]),
        "model.layers.0.mlp.experts.3.up_proj.weight": (-6.885384, [-0.02147348, -0.00883239, 0.03191585]),
        "model.layers.0.self_attn.q_norm.weight": (80.000000, [1.0, 1.0, 1.0]),
    },
}
# fmt: on


@pytest.mark.parametrize("kind", [MiniMindLM, MiniMindForCausalLM])
@pytest.mark.parametrize("name", ["small", "small_zero", "moe_v3"])
@pytest.mark.compat
def test_同一个种子的初始权重不随版本变(kind, name):
    config = {
        "small": lambda: preset("small", num_hidden_layers=2),
        "small_zero": lambda: preset("small", num_hidden_layers=2, zero_init_residual=True),
        "moe_v3": lambda: preset("moe", num_hidden_layers=1, arch="v3"),
    }[name]()
    torch.manual_seed(42)
    state = kind(config).state_dict()
    for key, (total, values) in INITIAL[name].items():
        assert state[key].double().sum().item() == pytest.approx(total, abs=1e-3), key
        assert state[key].flatten()[-3:].tolist() == pytest.approx(values, abs=1e-7), key


# ---------------------------------------------------------------- 输出


@pytest.mark.compat
def test_输出按属性按键按下标都能取_缓存两个名字都答应():
    model = make()
    out = model(IDS, labels=IDS, use_cache=True)
    assert out.past_key_values is out.cache is out["cache"] is out["past_key_values"] is out[2]
    assert "cache" in out and "past_key_values" in out and out.get("cache") is out.cache
    assert out[0] is out.loss is out["loss"] and out[1] is out.logits and out.to_tuple() == out[:]
    assert dict(**out) == dict(out) and dict(out)["logits"] is out.logits
    assert isinstance(out, dict) and set(out) == {
        "loss", "loss_sum", "target_count", "aux_loss", "logits", "past_key_values", "hidden_states"
    }  # fmt: skip
    plain = model(IDS)
    assert plain[0] is plain.logits and "loss" not in plain and plain.loss is None and plain.cache is None
    with pytest.raises(KeyError):
        plain["loss"]
    with pytest.raises(AttributeError, match="attentions"):
        _ = plain.attentions


def test_输出改了属性或键_两边都变():
    out = make()(IDS, labels=IDS)
    out.loss = out.loss * 2
    assert out["loss"] is out.loss is out[0]
    out["logits"] = None
    assert out.logits is None and "logits" not in out
    out["cache"] = object()
    assert out.past_key_values is out["past_key_values"]


def test_输出经得起_accelerate_与_DataParallel_的拆开再建():
    out = make()(IDS, labels=IDS)
    for again in (
        type(out)({k: v for k, v in out.items()}),  # accelerate 逐项转精度
        type(out)((k, out[k]) for k in out),  # DataParallel 的 gather
        pickle.loads(pickle.dumps(HFOutput({k: v.detach() for k, v in out.items()}))),
        copy.copy(out),
    ):
        assert type(again) is HFOutput and list(again) == list(out)
        assert torch.equal(again.loss, out.loss) and torch.equal(again["logits"], again.logits)
        assert again.past_key_values is None and again[0] is again.loss
    accelerate = pytest.importorskip("accelerate")  # 随 peft 而来
    half = accelerate.utils.convert_to_fp32(make().to(torch.bfloat16)(IDS))
    assert half.logits.dtype == half["logits"].dtype == torch.float32


def test_return_dict_False_给元组():
    model = make()
    loss, logits = model(IDS, labels=IDS, return_dict=False)
    assert torch.equal(loss, model(IDS, labels=IDS).loss) and logits.shape == (2, 12, 97)
    assert len(model(IDS, return_dict=False)) == 1
    logits, cache = model(IDS, use_cache=True, return_dict=False)
    assert cache.get_seq_length() == 12


@pytest.mark.compat
def test_不认识的与做不到的参数都拒绝():
    model = make()
    for bad in (dict(lables=IDS), dict(use_cahce=True), dict(attention_masks=torch.ones(2, 12))):
        with pytest.raises(TypeError, match=next(iter(bad))):
            model(IDS, **bad)
    for wanted in ("output_attentions", "output_hidden_states"):
        with pytest.raises(ValueError, match=wanted):
            model(IDS, **{wanted: True})
        assert model(IDS, **{wanted: False}).logits.shape == (2, 12, 97)
        with pytest.raises(ValueError, match=wanted):
            model.generate(IDS, max_new_tokens=2, return_dict_in_generate=True, **{wanted: True})
    for bad in ("top_q", "attention_masks", "max_new_token"):
        with pytest.raises((ValueError, TypeError), match=bad):
            model.generate(IDS, **{bad: 3})
    with pytest.raises(TypeError, match="同一个缓存"):
        model(IDS, cache=DynamicCache(), past_key_values=DynamicCache())
    for loss in (nn.CrossEntropyLoss(), nn.functional.cross_entropy):
        with pytest.raises(ValueError, match="loss_function 换了也不起作用"):
            model.loss_function = loss


# ---------------------------------------------------------------- 下一版再改名


class RenamedModel(MiniMindForCausalLM):
    """替身：下一版的 transformers 只认 ``kv_state`` 这个名字。"""

    def forward(self, *args, **kwargs):
        assert not {"cache", "past_key_values"} & {k for k, v in kwargs.items() if v is not None}
        return super().forward(*args, **kwargs)


@torch.no_grad()
def test_缓存换成第三个名字也照样算():
    model = make(kind=RenamedModel)
    whole = model(IDS).logits
    first = model(IDS[:, :7], kv_state=DynamicCache())
    assert first.kv_state is first["kv_state"] is first.past_key_values is first.cache
    second = model(IDS[:, 7:], kv_state=first.kv_state)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole)
    with pytest.raises(TypeError, match="kv_state"):
        model(IDS, kv_state=3)  # 不是缓存


WITHOUT_TRANSFORMERS_MODELS = """
import sys
for name in ("modeling_utils", "modeling_outputs", "cache_utils", "generation.utils"):
    sys.modules[f"transformers.{name}"] = None  # 引用就报错
import torch
from minimind.inference.generate import generate_batch
from minimind.model import MiniMindConfig, MiniMindLM
from minimind.inference.engine import Engine
from minimind.inference.sampling import SamplingParams

torch.manual_seed(0)
for extra in ({}, {"arch": "v3"}, {"use_moe": True}):
    model = MiniMindLM(MiniMindConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=97, **extra))
    ids = torch.arange(3, 27).view(2, 12)
    before = model.train()(ids, labels=ids)
    before.loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad)
    assert model(ids, labels=ids).loss < before.loss
    model.eval()
    greedy = dict(generate_batch(model, ids.tolist(), max_new_tokens=6, eos_ids=()))
    for row in range(2):
        seen = ids[row : row + 1]
        for token in greedy[row].ids:
            assert model(seen).logits[0, -1].argmax() == token
            seen = torch.cat([seen, torch.tensor([[token]])], 1)
    engine = Engine(model, eos_ids=())
    engine.add_request(ids[0].tolist(), SamplingParams(temperature=0.0), 1, score=2)
    scored = []
    while engine.has_unfinished:
        scored += [score for sequence in engine.step() for score in sequence.scored]
    expected = model(ids[:1]).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(torch.tensor([score[0] for score in scored]), expected, atol=1e-5)
"""


@pytest.mark.compat
def test_训练_引擎_评分用不到_transformers_的模型与缓存(root_dir):
    subprocess.run([sys.executable, "-c", WITHOUT_TRANSFORMERS_MODELS], check=True, cwd=root_dir, timeout=300)
