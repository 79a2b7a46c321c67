"""导入：来回一趟一位不变；公共项目与 transformers 存的目录进来后输出相同；不对的东西说清楚、不留半截。"""

from __future__ import annotations

import json

import pytest
import torch
from export_helpers import SMALL, save_small
from other_models import write_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minimind.errors import UserError
from minimind.export.cli import main_import
from minimind.export.hf import export_hf
from minimind.export.importing import import_model
from minimind.export.source import open_source
from minimind.inference.loading import load_for_inference, stop_ids
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.runtime.checkpoint import check_same_config, config_dict, read_sidecar
from minimind.runtime.weights import init_model
from minimind.trainer.trainer_utils import STRUCTURE


def load_state(path):
    return torch.load(path, weights_only=True)


@torch.no_grad()
def native_logits(path, ids):
    """按旁注重建模型，用导入的权重算。"""
    model = MiniMindForCausalLM(MiniMindConfig(**read_sidecar(path)["config"])).eval()
    model.load_state_dict(load_state(path))
    return model(ids).logits


@pytest.mark.parametrize(
    "kind",
    [
        *("v2", "v3", "v3_moe", "v2_moe", "v2_moe_two_shared", "v2_moe_unnormalised", "v2_head_dim"),
        "v2_untied",
    ],
)
@pytest.mark.compat
def test_导出再导入_权重逐位相同_配置与指标还在(make_source, tmp_path, kind):
    source, _ = make_source(kind)
    export_hf(source, tmp_path / "hf", torch.float16)
    target, _ = import_model(str(tmp_path / "hf"), "back", str(tmp_path / "out"))
    assert target.name == ("back_64_moe.pth" if source.config.use_moe else "back_64.pth")
    before, after = load_state(source.path), load_state(target)
    assert before.keys() == after.keys()
    assert all(after[k].dtype == torch.float16 and torch.equal(v, after[k]) for k, v in before.items())
    old, new = read_sidecar(source.path), read_sidecar(target)
    structure = {key: value for key, value in old["config"].items() if key in STRUCTURE}
    check_same_config(structure, new["config"], "x", "x")
    assert {old[k] == new[k] for k in ("tokenizer_hash", "recipe", "step", "metrics")} == {True}
    loaded = load_for_inference(save_dir=str(tmp_path / "out"), weight="back", device="cpu")
    assert not loaded.plain


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("model.layers.1.mlp.shared_expert_gate.weight", "shared_expert_gate.*不是零"),
        ("model.layers.0.self_attn.q_proj.bias", r"q_proj\.bias 不是零"),
        ("shared_expert_intermediate_size", "100.*整数倍"),
    ],
)
def test_真的带门或带偏置的_Qwen2_MoE_说清是哪一项(make_source, tmp_path, change, words):
    source, _ = make_source("v2_moe")
    export_hf(source, tmp_path / "hf", torch.float32)
    if change.endswith("size"):
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        (tmp_path / "hf" / "config.json").write_text(json.dumps({**config, change: 100}))
    else:
        state = load_file(tmp_path / "hf" / "model.safetensors")
        state[change].view(-1)[3] = 0.5
        save_file(state, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(UserError, match=words):
        import_model(str(tmp_path / "hf"), "back", str(tmp_path / "out"))
    assert not (tmp_path / "out" / "back_64_moe.pth").exists()


def test_fp32_与_bf16_进来不变精度_要求时才转(make_source, tmp_path):
    source, model = make_source("v3")
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        export_hf(source, tmp_path / name, dtype)
        target, _ = import_model(str(tmp_path / name), None, str(tmp_path / "out"))
        state = load_state(target)
        assert target.name == f"{name}_64.pth"
        assert all(
            torch.equal(state[k], v.to(dtype)) and state[k].dtype == dtype
            for k, v in model.state_dict().items()
        )
    target, _ = import_model(str(tmp_path / "float32"), "half", str(tmp_path / "out"), torch.float16)
    assert {value.dtype for value in load_state(target).values()} == {torch.float16}


@pytest.mark.parametrize("name", ["v2_dense", "v2_moe_seqaux", "v3_dense", "v3_moe"])
def test_公共项目的目录与_pth_进来后_logits_与它自己的相同(shared_dir, tmp_path, name):
    data = load_file(shared_dir / "golden" / f"{name}.safetensors")
    with safe_open(shared_dir / "golden" / f"{name}.safetensors", "pt") as f:
        config = json.loads(f.metadata()["config"])
    state = {key[2:]: value for key, value in data.items() if key.startswith("w.")}
    # 目录：配置没有 arch，权重是 .bin，还带着位置编码的表
    folder = tmp_path / "MiniMind2"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "minimind", **config}))
    torch.save({**state, "model.freqs_cos": torch.ones(4)}, folder / "pytorch_model.bin")
    target, _ = import_model(str(folder), None, str(tmp_path / "out"))
    torch.testing.assert_close(
        native_logits(target, data["input_ids"]), data["logits_eval"], atol=1e-4, rtol=0
    )
    # .pth：没有旁注，尺寸从形状认
    torch.save(state, tmp_path / "pub_1.pth")
    options = {key: config[key] for key in ("num_attention_heads", "num_experts_per_tok") if key in config}
    target, model = import_model(str(tmp_path / "pub_1.pth"), None, str(tmp_path / "out"), **options)
    assert target.name.startswith("pub_") and any("rope_theta" in note for note in model.notes)
    torch.testing.assert_close(
        native_logits(target, data["input_ids"]), data["logits_eval"], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
@pytest.mark.compat
def test_transformers_自己存的目录_分片也行(tmp_path, ids, kind):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**SMALL, "vocab_size": 6400, "intermediate_size": 96, "head_dim": 16, "rope_theta": 5e5}
    moe = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": False}
    config = AutoConfig.for_model(
        kind, **sizes, **(moe if kind == "qwen3_moe" else {}), initializer_range=0.1
    )
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="1MB" if kind == "llama" else "5GB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").is_file() == (kind == "llama")
    target, _ = import_model(str(tmp_path / "hf"), "theirs", str(tmp_path / "out"))
    with torch.no_grad():
        expected = theirs(ids).logits
    assert expected.std() > 0.1
    assert (native_logits(target, ids) - expected).abs().max() < 1e-4
    if kind == "llama":
        next((tmp_path / "hf").glob("model-00001*")).unlink()
        with pytest.raises(UserError, match="缺少 model-00001"):
            import_model(str(tmp_path / "hf"), "again", str(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["llama", "qwen", "mistral"])
def test_目录里写的结束符一个不少_再导出也在(tmp_path, kind):
    folder, out = tmp_path / "hf", str(tmp_path / "out")
    write_model(folder, kind)
    wanted = set(json.loads((folder / "generation_config.json").read_text("utf-8"))["eos_token_id"])
    assert len(wanted) == (1 if kind == "mistral" else 2)
    target, _ = import_model(str(folder), "m", out)
    options = {"tokenizer_path": str(folder), "device": "cpu"}
    loaded = load_for_inference(save_dir=out, weight=str(target), **options)
    theirs = load_for_inference(load_from=str(folder), device="cpu")
    assert stop_ids(loaded.model, loaded.tokenizer) == wanted == stop_ids(theirs.model, theirs.tokenizer)
    source = open_source(str(target), out, tokenizer_path=str(folder))
    export_hf(source, tmp_path / "back", torch.float32)
    again = json.loads((tmp_path / "back" / "generation_config.json").read_text("utf-8"))
    assert set(again["eos_token_id"]) == wanted
    assert again["bos_token_id"] == theirs.model.config.bos_token_id  # Qwen 的是 None
    # 接着训练的也带着
    config = MiniMindConfig(**{**read_sidecar(target)["config"], "eos_token_id": 2})
    start, _ = init_model(config, "m", str(folder), out, "cpu")
    assert start.config.eos_token_id == read_sidecar(target)["config"]["eos_token_id"]


def test_已在_out_里的公共_pth_只补旁注(tmp_path):
    model = save_small(tmp_path / "out", "v2", num_attention_heads=8)
    path = tmp_path / "out" / "tiny_64.pth"
    path.with_suffix(".json").unlink()
    before = path.read_bytes()
    assert main_import([str(path), "--save_dir", str(tmp_path / "out")]) == 0
    assert path.read_bytes() == before
    config = read_sidecar(path)["config"]
    assert {config[k] == v for k, v in config_dict(model.config).items() if k in STRUCTURE} == {True}


def test_名字里有_pretrain_的按只会续写(tmp_path):
    save_small(tmp_path / "a", "v2")
    path = tmp_path / "a" / "tiny_64.pth"
    path.with_suffix(".json").unlink()
    target, _ = import_model(str(path), "pretrain_b", str(tmp_path / "out"), num_attention_heads=4)
    assert load_for_inference(save_dir=str(tmp_path / "out"), weight="pretrain_b", device="cpu").plain
    assert target.name == "pretrain_b_64.pth"


@pytest.fixture
def folder(make_source, tmp_path):
    source, _ = make_source("v2")
    export_hf(source, tmp_path / "hf", torch.float16)
    return tmp_path / "hf"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}))


def edit_weights(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: edit_config(f, model_type="gpt2"), r"config\.json：model_type 是 'gpt2'.*llama"),
        (lambda f: edit_config(f, attention_bias=True), r"attention_bias 是 True；期望：False"),
        (lambda f: edit_config(f, rope_scaling={"rope_type": "linear", "factor": 2.0}), "rope_scaling 是.*yarn"),
        (lambda f: edit_config(f, intermediate_size=128), r"safetensors：model\.layers\.0\.mlp\.\w+ ?.*\(192, 64\).*\(128, 64\)"),
        (lambda f: edit_weights(f, lambda s: s.pop(UP)), rf"缺少 1 个键（如 {UP}）"),
        (lambda f: edit_weights(f, lambda s: s.update(extra=torch.ones(2))), "多出 1 个键（如 extra）"),
        (lambda f: edit_weights(f, lambda s: s.update({NORM: torch.ones(63)})), r"norm.*\(63,\).*\(64,\)"),
        (lambda f: edit_config(f, tie_word_embeddings=False), r"没有 lm_head\.weight"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json：不是合法的 JSON"),
        (lambda f: edit_config(f, hidden_size="abc"), r"config\.json：配置不成立.*hidden_size"),
        (lambda f: edit_config(f, num_hidden_layers=10**9), "权重有 2 层；期望.*1000000000"),
        (lambda f: edit_config(f, rms_norm_eps=float("inf")), "含有 Infinity"),
        (lambda f: (f / "config.json").unlink(), r"没有 config\.json"),
        (lambda f: (f / "model.safetensors").unlink(), "没有权重"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\x08"), r"model\.safetensors：读不了"),
    ],
)  # fmt: skip
def test_不对的目录说清文件与键_什么也不写(folder, tmp_path, damage, words):
    damage(folder)
    with pytest.raises(UserError, match=words):
        import_model(str(folder), "bad", str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_不认识的_pth_说清楚(tmp_path, capsys):
    torch.save({"layers.0.attention.wq.weight": torch.ones(4, 4)}, tmp_path / "old_512.pth")
    assert main_import([str(tmp_path / "old_512.pth"), "--save_dir", str(tmp_path / "new")]) == 2
    assert "layers.0.attention.wq.weight" in capsys.readouterr().err
    torch.save({"model": {}, "step": 3}, tmp_path / "resume.pth")
    assert main_import([str(tmp_path / "resume.pth"), "--save_dir", str(tmp_path / "new")]) == 2
    assert "不是普通的权重字典" in capsys.readouterr().err
    assert main_import([str(tmp_path / "none"), "--save_dir", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


def test_已有同名权重不覆盖(folder, tmp_path, capsys):
    arguments = [str(folder), "--name", "tiny", "--save_dir", str(tmp_path / "out")]
    assert main_import(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert main_import([*arguments, "--force"]) == 0


def test_分词器不是随包的时提醒带上它(folder, tmp_path, capsys):
    text = (folder / "tokenizer_config.json").read_text("utf-8")
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(text.replace("# 工具", "# Tools"), "utf-8")
    assert main_import([str(folder), "--name", "b", "--save_dir", str(tmp_path / "out")]) == 0
    assert f"--tokenizer_path {folder}" in capsys.readouterr().err
    with pytest.raises(UserError, match="另一个分词器"):
        load_for_inference(save_dir=str(tmp_path / "out"), weight="b", device="cpu")
    where = {"save_dir": str(tmp_path / "out"), "tokenizer_path": str(folder)}
    assert load_for_inference(weight="b", device="cpu", **where).source.name == "b_64.pth"
