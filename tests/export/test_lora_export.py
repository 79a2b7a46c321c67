"""LoRA 导出：peft 加载后 logits 与我们的相同；合并后的权重文件与叠加的输出相同；坏输入说得清。"""

import json

import pytest
import torch

from minimind.errors import UserError
from minimind.export.lora import main_lora, main_merge, target_names, write_peft_adapter
from minimind.export.twin import transformers_twin
from minimind.inference.loading import load_for_inference
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.model.model_lora import apply_lora, load_adapter, lora_layers, lora_state_dict, parse_adapter
from minimind.runtime.checkpoint import config_dict, save_weights, weights_path

IDS = torch.arange(3, 27).view(2, 12)


def model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    return MiniMindForCausalLM(MiniMindConfig(**{**sizes, **changes})).eval()


def trained(rank=4, alpha=6.0, targets="all", seed=1, **changes):
    """像训练过一样的增量：B 不是零。"""
    net = model(**changes)
    apply_lora(net, rank, alpha, targets)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(net).values():
        layer.lora.B.weight.data.normal_(std=0.1, generator=generator)
    state = {key: value.clone() for key, value in lora_state_dict(net).items()}
    return parse_adapter(state, alpha)


@torch.no_grad()
def logits(net):
    return net(input_ids=IDS).logits


CASES = {
    "全部线性层": ("all", {}),
    "方阵": ("square", {}),
    "指定层名": ("v_proj,down_proj", {}),
    "v3": ("all", {"arch": "v3"}),
    "混合专家": ("all", {"use_moe": True}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.compat
def test_peft_加载后_logits_相同(name, tmp_path):
    peft = pytest.importorskip("peft")
    targets, changes = CASES[name]
    adapter = trained(targets=targets, **changes)
    ours = model(**changes)
    load_adapter(ours, adapter)
    write_peft_adapter(model(**changes), adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(model(**changes), tmp_path).eval()
    got = logits(theirs)
    assert (got - logits(ours)).abs().max() < 1e-5
    assert (got - logits(model(**changes))).abs().max() > 1e-2  # 增量确实起了作用
    merged = theirs.merge_and_unload()
    assert (logits(merged) - got).abs().max() < 1e-5


def test_同样的适配器装在_transformers_的_Llama_上(tmp_path):
    """导出给 transformers 用的底座是同构的 Llama，模块名相同，适配器原样可用。"""
    peft = pytest.importorskip("peft")
    base, adapter = model(), trained()
    llama = transformers_twin(base).eval()
    assert (logits(llama) - logits(base)).abs().max() < 1e-5
    write_peft_adapter(base, adapter, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama, tmp_path).eval()
    ours = model()
    load_adapter(ours, adapter)
    assert (logits(theirs) - logits(ours)).abs().max() < 1e-5


def test_层名选不准时写模块全名():
    modules = ("model.layers.1.self_attn.q_proj",)
    assert target_names(model(), modules) == list(modules)
    everywhere = tuple(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))
    assert target_names(model(), everywhere) == ["q_proj"]


@pytest.fixture
def out(tmp_path):
    """有底座与两份 LoRA 的目录。"""
    base = model()
    info = {"config": config_dict(base.config), "recipe": "full_sft", "step": 7}
    save_weights(base, weights_path(base.config, "full_sft", tmp_path), info)
    for name, seed in (("lora_a", 1), ("lora_b", 2)):
        adapter = trained(seed=seed)
        lora = {"rank": adapter.rank, "alpha": adapter.alpha, "targets": "all"}
        path = weights_path(base.config, name, tmp_path / "lora")
        save_weights(adapter.state, path, {"config": {**config_dict(base.config), "lora": lora}})
    return tmp_path


def open_model(out, **options):
    return load_for_inference(save_dir=str(out), device="cpu", dtype="float32", **options).model


def test_合并成权重文件_与叠加的输出相同(out):
    assert main_merge(["--save_dir", str(out), "--lora_weight", "lora_a,lora_b"]) == 0
    stacked = open_model(out, weight="full_sft", lora_weight="lora_b, lora_a")
    merged = open_model(out, weight="merged")
    # 文件是 fp16，差在舍入
    assert (logits(merged) - logits(stacked)).abs().max() < 5e-3
    assert (logits(merged) - logits(open_model(out, weight="full_sft"))).abs().max() > 1e-2
    sidecar = json.loads((out / "merged_64.json").read_text())
    assert sidecar["recipe"] == "full_sft" and sidecar["merged"]["lora"] == ["lora_a", "lora_b"]
    assert "lora" not in sidecar["config"]


def test_命令行导出适配器_文件里的就是训练出的矩阵(out):
    from safetensors.torch import load_file

    assert main_lora(["--save_dir", str(out), "--lora_weight", "lora_a"]) == 0
    folder = out / "export" / "lora_a_64"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 6, "LORA")
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    ours = torch.load(out / "lora" / "lora_a_64.pth", weights_only=True)
    theirs = load_file(folder / "adapter_model.safetensors")
    assert len(theirs) == len(ours) == 2 * 7 * 2
    key = "model.layers.1.mlp.up_proj"
    assert torch.equal(theirs[f"base_model.model.{key}.lora_B.weight"], ours[f"{key}.lora.B.weight"])


@pytest.mark.parametrize(
    "command, flags, words",
    [
        (main_lora, ["--lora_weight", "a,b"], "一次导出一份"),
        (main_lora, ["--lora_weight", "None"], "没有写是哪个 LoRA"),
        (main_lora, ["--lora_weight", "lora_c"], "lora_a_64.pth、lora_b_64.pth"),
        (main_merge, ["--lora_weight", "lora_a", "--save_weight", "full_sft"], "盖掉底座"),
        (main_merge, ["--lora_weight", "lora_c"], "没有 LoRA 权重"),
    ],
)
def test_坏输入_说得清(out, capsys, command, flags, words):
    assert command(["--save_dir", str(out), *flags]) == 2
    assert words in capsys.readouterr().err


def test_别的尺寸的底座_指出键与形状(out):
    other = model(hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    info = {"config": config_dict(other.config), "recipe": "full_sft"}
    save_weights(other, weights_path(other.config, "full_sft", out), info)
    lora = str(out / "lora" / "lora_a_64.pth")
    with pytest.raises(UserError, match=r"q_proj\.lora\.A\.weight.*\(4, 64\).*\(4, 32\)"):
        open_model(out, weight="full_sft", lora_weight=lora, hidden_size=32)
