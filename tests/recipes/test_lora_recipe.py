"""LoRA 配方：只写 A 与 B、旁注齐全、叠加时读得回来、公共项目的文件能用、坏输入说得清。"""

import json
import shutil

import pytest
import torch
from recipe_cases import make_base

from minimind.arguments import parse_args
from minimind.errors import UserError
from minimind.inference.loading import load_for_inference
from minimind.model.model_lora import apply_lora, lora_layers, lora_state_dict
from minimind.recipes import lora
from minimind.runtime import device
from minimind.runtime.adapters import base_fingerprint, merge_adapters, read_adapter
from minimind.runtime.checkpoint import config_dict, save_weights, weights_path

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "max_seq_len": 64,
    "batch_size": 2,
    "val_ratio": 0,
    "save_interval": 0,
    "device": "cpu",
    "dtype": "float32",
    "data_path": "who.jsonl",
}
NAMES = ("小雾", "阿圆", "米婆", "云姐", "麦子", "石头")
IDS = torch.arange(3, 27).view(2, 12)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(device, "PEAK_SECONDS", 0.0)
    monkeypatch.chdir(make_base(tmp_path))
    turns = [
        [{"role": "user", "content": f"{name}是谁？"}, {"role": "assistant", "content": f"{name}是灯。"}]
        for name in NAMES * 4
    ]
    lines = (json.dumps({"conversations": turn}, ensure_ascii=False) + "\n" for turn in turns)
    (tmp_path / "who.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def train(**changes):
    return lora.run(lora.LoRAArguments(**{**SMALL, **changes}))


def open_model(lora_weight="None", **options):
    options = {"weight": "full_sft", "device": "cpu", "dtype": "float32", **options}
    return load_for_inference(lora_weight=lora_weight, **options).model


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_只写A与B_旁注记着设置与底座_叠加时读得回来(home, capsys):
    base = (home / "out" / "full_sft_64.pth").read_bytes()
    result = train(lora_rank=4, lora_alpha=12.0, epochs=4, learning_rate=1e-2, log_interval=1)
    losses = [json.loads(line)["loss"] for line in result.log.read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.5  # 底座是随机的，词嵌入又不动，能降的有限
    assert result.weights == home / "out" / "lora" / "lora_identity_64.pth"
    assert (home / "out" / "full_sft_64.pth").read_bytes() == base
    state = torch.load(result.weights, weights_only=True)
    assert len(state) == 2 * 7 * 2 and all(".lora." in key for key in state)
    assert state["model.layers.0.mlp.down_proj.lora.A.weight"].shape == (4, 192)
    assert any(value.abs().max() > 0 for key, value in state.items() if key.endswith("B.weight"))
    said = capsys.readouterr().err
    assert "是底座的" in said and "按现在的速度，本次全程约" in said

    info = json.loads(result.weights.with_suffix(".json").read_text())["config"]["lora"]
    assert (info["rank"], info["alpha"], info["targets"]) == (4, 12.0, "all")
    assert info["base"] == {"weight": "full_sft", "fingerprint": base_fingerprint(open_model())}
    # 续训存档里是训练时的模型；文件是 fp16，差在舍入
    trained = open_model()
    apply_lora(trained, 4, 12.0)
    trained.load_state_dict(torch.load("checkpoints/lora_identity_64_resume.pth", weights_only=True)["model"])
    assert (logits(open_model("lora_identity")) - logits(trained)).abs().max() < 2e-3
    assert (logits(open_model("lora_identity")) - logits(open_model())).abs().max() > 1e-2


def write_lora(home, name, rank=4, seed=1, targets="all", **changes):
    """不训练，直接写一份 LoRA；返回它的路径。"""
    model = open_model(**changes)
    apply_lora(model, rank, 8.0, targets)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.lora.B.weight.data.normal_(std=0.1, generator=generator)
    info = {"rank": rank, "alpha": 8.0, "targets": targets}
    info["base"] = {"weight": "full_sft", "fingerprint": base_fingerprint(model)}
    path = weights_path(model.config, name, home / "out" / "lora")
    save_weights(lora_state_dict(model), path, {"config": {**config_dict(model.config), "lora": info}})
    return path


def test_几份一起叠加_次序无关_None_不叠加(home):
    write_lora(home, "a")
    write_lora(home, "b", seed=2, targets="square")
    both = logits(open_model("a,b"))
    assert (both - logits(open_model(" b , a"))).abs().max() < 1e-5
    plain = logits(open_model())
    for other in ("a", "b"):
        assert (both - logits(open_model(other))).abs().max() > 1e-3
    for nothing in ("none", ""):
        assert torch.equal(logits(open_model(nothing)), plain)


def test_公共项目的文件_没有旁注_只有方阵_按不缩放读(home):
    model = open_model()
    apply_lora(model, 8, 8.0, "square")
    for layer in lora_layers(model).values():
        layer.lora.B.weight.data.normal_(std=0.1)
    # 公共项目的文件：fp16，可能带 DDP 的前缀
    state = {f"module.{key}": value.half() for key, value in lora_state_dict(model).items()}
    (home / "out" / "lora").mkdir()
    torch.save(state, home / "out" / "lora" / "lora_medical_64.pth")
    assert (logits(open_model("lora_medical")) - logits(model)).abs().max() < 2e-3
    path = str(home / "out" / "lora" / "lora_medical_64.pth")
    assert torch.equal(logits(open_model(path)), logits(open_model("lora_medical")))


def test_没有这份权重_指出文件_命令与现有的(home):
    write_lora(home, "lora_identity")
    with pytest.raises(UserError) as caught:
        open_model("lora_medical")
    text = str(caught.value)
    assert "lora_medical_64.pth" in text and "--lora_name lora_medical" in text
    assert "lora_identity_64.pth" in text


def test_把普通权重当成LoRA_指出键与形状(home):
    with pytest.raises(UserError, match=r"full_sft_64\.pth.*embed_tokens.*\(6400, 64\)"):
        open_model(str(home / "out" / "full_sft_64.pth"))


def test_尺寸不符_指出文件_键与形状(home):
    path = write_lora(home, "lora_identity")
    make_base(home, hidden_size=32)
    with pytest.raises(UserError, match=r"lora_identity_64\.pth.*lora\.A\.weight.*\(4, 64\).*\(4, 32\)"):
        open_model(str(path), hidden_size=32)


def test_旁注与权重不是一对_换了底座要说(home, capsys):
    first, second = write_lora(home, "a"), write_lora(home, "b", rank=8)
    shutil.copy(first, second)
    with pytest.raises(UserError, match="旁注写着秩 8，权重的秩是 4"):
        read_adapter(second)
    model = open_model()
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    capsys.readouterr()
    merge_adapters(model, ["a"])
    assert "底座与那时不同" in capsys.readouterr().err


def test_换了秩不能续训(home):
    train(epochs=1)
    with pytest.raises(UserError, match="--lora_rank 存档里是 8、现在是 4"):
        train(epochs=2, lora_rank=4, from_resume=1)
    assert train(epochs=2, from_resume=1).step == 2 * train(epochs=1).step


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"lora_rank": 0}, "--lora_rank"),
        ({"lora_alpha": -1.0}, "--lora_alpha"),
        ({"lora_targets": "gate"}, "q_proj"),
    ],
)
def test_参数不对_说出是哪个(home, changes, words):
    with pytest.raises(UserError, match=words):
        train(**changes)


def test_用同名的数据文件(home, monkeypatch, capsys):
    (home / "dataset").mkdir()
    shutil.copy("who.jsonl", "dataset/lora_medical.jsonl")
    result = train(lora_name="lora_medical", data_path=None, epochs=1)
    assert "dataset/lora_medical.jsonl" in capsys.readouterr().err
    assert result.weights.name == "lora_medical_64.pth"


def test_名字_save_weight_与_lora_name_同义():
    for flags in (["--lora_name", "lora_a"], ["--save_weight", "lora_a"]):
        args = parse_args(lora.LoRAArguments, flags)
        assert (args.lora_name, args.save_weight) == ("lora_a", "lora_a")
    assert lora.LoRAArguments().save_weight == "lora_identity"
