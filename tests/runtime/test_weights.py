"""权重的一扇门：没有旁注的公共 .pth，对话、蒸馏、导入、训练认出同样的结构；写错的尺寸说清是哪一项。"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from other_models import write_model, write_tokenizer
from transformers import PretrainedConfig

from minimind import chat
from minimind.dataset import SFTDataset
from minimind.errors import UserError
from minimind.export.cli import main_hf
from minimind.export.importing import import_model
from minimind.inference.loading import _check_folder_sizes, load_for_inference
from minimind.model import MiniMindConfig, MiniMindForCausalLM
from minimind.recipes import full_sft
from minimind.recipes.distillation import DistillationArguments
from minimind.recipes.teacher import choose_models
from minimind.runtime.checkpoint import read_sidecar
from minimind.runtime.weights import STRUCTURE
from minimind.tokenizer import encode_chat, load_tokenizer
from minimind.trainer.trainer_utils import init_model

KINDS = {
    "v3": {"arch": "v3", "num_hidden_layers": 16},
    "v3_moe": {"arch": "v3", "use_moe": True, "num_hidden_layers": 3, "n_routed_experts": 3},
    "v2": {"num_hidden_layers": 11, "num_attention_heads": 8},
    "v2_moe": {"use_moe": True, "num_hidden_layers": 3, "num_attention_heads": 8},
}
TALK = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好，世界。"},
    {"role": "user", "content": "今天天气怎么样？"},
]


def public_pth(folder, kind: str, **changes) -> MiniMindForCausalLM:
    """公共项目的 ``full_sft_64[_moe].pth``：没有旁注，还存着位置编码的表。"""
    torch.manual_seed(3)
    config = MiniMindConfig(**{"hidden_size": 64, **KINDS[kind], **changes})
    model = MiniMindForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_((1 + 0.3 * torch.randn(value.shape) if "norm" in name else 4 * value).half().float())
    folder.mkdir(exist_ok=True)
    state = {key: value.half() for key, value in model.state_dict().items()}
    state["model.freqs_cos"] = torch.zeros(4, dtype=torch.int64)
    torch.save(state, folder / f"full_sft_64{'_moe' * config.use_moe}.pth")
    return model


def structure(config) -> dict:
    return {key: getattr(config, key) for key in STRUCTURE}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_没有旁注的公共权重_对话蒸馏导入认出同样的结构(tmp_path, kind):
    model = public_pth(tmp_path / "out", kind)
    want, ids = structure(model.config), torch.arange(20)[None]
    path = next((tmp_path / "out").glob("*.pth"))
    chatted = load_for_inference(save_dir=str(tmp_path / "out"), device="cpu", dtype="float32").model
    assert structure(chatted.config) == want
    assert torch.equal(chatted(ids).logits, model(ids).logits)
    args = DistillationArguments(save_dir=str(tmp_path / "out"), student_hidden_size=32)
    teacher = choose_models(args)
    assert structure(teacher.config) == want
    target, imported = import_model(str(path), "back", str(tmp_path / "out"))
    assert structure(imported.config) == want
    assert {
        key: read_sidecar(target)["config"][key] for key in want if key in read_sidecar(target)["config"]
    } == {key: value for key, value in want.items() if key in read_sidecar(target)["config"]}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"num_hidden_layers": 8}, "num_hidden_layers 权重里是 16、要的是 8.*--num_hidden_layers 16"),
        ({"arch": "v2"}, "arch 权重里是 'v3'、要的是 'v2'.*--arch v3"),
        (
            {"arch": "v2", "num_hidden_layers": 8},
            "arch .*num_hidden_layers .*--arch v3 --num_hidden_layers 16",
        ),
    ],
)
def test_写错的尺寸_说出权重里是多少(tmp_path, flags, words):
    public_pth(tmp_path, "v3")
    with pytest.raises(UserError, match=words):
        load_for_inference(save_dir=str(tmp_path), device="cpu", **flags)
    sizes = {"hidden_size": 64, "arch": "v3", "num_hidden_layers": 16, **flags}
    with pytest.raises(UserError, match=words):
        init_model(MiniMindConfig(**sizes), "full_sft", save_dir=tmp_path, device="cpu")


def test_尺寸写对的照常_训练也接得上(tmp_path):
    model = public_pth(tmp_path, "v3")
    flags = {"hidden_size": 64, "arch": "v3", "num_hidden_layers": 16}
    assert load_for_inference(save_dir=str(tmp_path), device="cpu", use_moe=0, **flags)
    start, _ = init_model(MiniMindConfig(**flags), "full_sft", save_dir=tmp_path, device="cpu")
    assert torch.equal(start.lm_head.weight, model.lm_head.weight)


def test_分词器比权重的词表大_说清楚(tmp_path):
    public_pth(tmp_path, "v3", vocab_size=500)
    with pytest.raises(UserError, match=r"6400 个词，这份权重只有 500 个.*--tokenizer_path"):
        load_for_inference(save_dir=str(tmp_path), device="cpu")


def test_公共v3与它的分词器_对话_微调_导出的id都是它的模板(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    folder, out = tmp_path / "tokenizer", tmp_path / "out"
    write_tokenizer(folder, "minimind3")
    tokenizer = load_tokenizer(folder)
    public_pth(out, "v3", num_hidden_layers=2, vocab_size=len(tokenizer))
    want = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False, add_generation_prompt=True)
    common = {"save_dir": str(out), "tokenizer_path": str(folder), "device": "cpu"}
    session = chat.open_session(chat.ChatArguments(**common, historys=2))
    session.messages = TALK[:2]
    assert session.encode(TALK[2]["content"]) == want

    data = tmp_path / "sft.jsonl"
    talk = [*TALK, {"role": "assistant", "content": "晴。"}]
    data.write_text(json.dumps({"conversations": talk}, ensure_ascii=False) + "\n", "utf-8")
    words = "--arch v3 --hidden_size 64 --num_hidden_layers 2 --from_weight full_sft --save_weight tuned --val_ratio 0"
    words += " --epochs 1 --batch_size 1 --max_seq_len 256 --dtype float32"
    places = {**common, "data_path": data, "checkpoint_dir": tmp_path / "checkpoints"}
    assert full_sft.main([*words.split(), *(str(w) for k, v in places.items() for w in (f"--{k}", v))]) == 0
    assert (out / "tuned_64.pth").is_file()
    row = SFTDataset(str(data), tokenizer, 256)[0]
    whole = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=False)
    count = row["num_tokens"]  # 最后的换行不要：后面没有要学的了
    assert row["input_ids"][:count].tolist() == whole[:count] and count == len(whole) - 1

    assert (
        main_hf(["tuned", str(tmp_path / "hf"), "--save_dir", str(out), "--tokenizer_path", str(folder)]) == 0
    )
    back = load_for_inference(load_from=str(tmp_path / "hf"), device="cpu").tokenizer
    assert (
        back.apply_chat_template(TALK, tokenize=True, return_dict=False, add_generation_prompt=True) == want
    )
    assert encode_chat(back, TALK, add_generation_prompt=True).ids == want


def test_公共项目的v3目录没写arch_从键认(tmp_path):
    model = public_pth(tmp_path / "out", "v3", num_hidden_layers=2)
    folder = tmp_path / "hf"
    model.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    del config["arch"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    loaded = load_for_inference(load_from=str(folder), device="cpu", dtype="float32")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hidden_size": 512}, "目录里是 64，命令行写的是 512"),
        ({"num_hidden_layers": 8}, "--num_hidden_layers"),
        ({"use_moe": 1}, "--use_moe"),
        ({"arch": "v3"}, "没有这一项"),
        ({"inference_rope_scaling": True}, "rope_scaling"),
    ],
)
def test_读目录时_写了而用不上的尺寸与外推_说出来(tmp_path, given, said):
    write_model(tmp_path, "qwen")
    with pytest.raises(UserError, match=said):
        load_for_inference(load_from=str(tmp_path), device="cpu", **given)


@pytest.mark.parametrize(
    ("settings", "mixture"),
    [
        ({"num_local_experts": 8}, True),  # Mixtral
        ({"n_routed_experts": 64}, True),  # DeepSeek
        ({"num_experts": 0}, False),
        ({}, False),
    ],
)
def test_目录里是不是混合专家_看专家的个数_不看类名(settings, mixture):
    config = PretrainedConfig(hidden_size=64, num_hidden_layers=2, **settings)
    empty = dict.fromkeys(("hidden_size", "num_hidden_layers", "use_moe", "arch"))
    _check_folder_sizes(config, {**empty, "use_moe": mixture}, Path("x"))
    with pytest.raises(UserError, match="--use_moe"):
        _check_folder_sizes(config, {**empty, "use_moe": not mixture}, Path("x"))


def test_读目录时_相同的尺寸照收_YaRN用在自己的结构上_权重的名字说怎么用(tmp_path, capsys):
    model = public_pth(tmp_path / "out", "v3", num_hidden_layers=2)
    folder = tmp_path / "hf"
    model.save_pretrained(folder)
    load_tokenizer().save_pretrained(folder)
    config, options = model.config, {"load_from": str(folder), "device": "cpu", "dtype": "float32"}
    same = {"hidden_size": config.hidden_size, "num_hidden_layers": 2, "use_moe": 0, "arch": "v3"}
    loaded = load_for_inference(**options, **same)
    assert not loaded.model.config.inference_rope_scaling and "--weight" not in capsys.readouterr().err
    assert load_for_inference(**options, inference_rope_scaling=True).model.config.inference_rope_scaling
    capsys.readouterr()
    assert load_for_inference(**options, weight="pretrain").plain
    assert "只决定按续写模型提示" in capsys.readouterr().err
    assert not load_for_inference(**options, weight="dpo").plain
    assert "--weight dpo 没有用上" in capsys.readouterr().err
    load_for_inference(**options, save_dir=str(tmp_path))
    assert f"--save_dir {tmp_path} 没有用上" in capsys.readouterr().err
    with pytest.raises(UserError, match="目录里是 v3，命令行写的是 v2"):
        load_for_inference(**options, arch="v2")


def test_目录的配置与权重不是一套_不悄悄随机初始化(tmp_path):
    write_model(tmp_path, "qwen")
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    for layers, word in ((4, "缺少"), (2, "多出")):
        (tmp_path / "config.json").write_text(
            json.dumps({**config, "num_hidden_layers": layers, "layer_types": None}), "utf-8"
        )
        with pytest.raises(UserError, match=f"{word} .*model.layers"):
            load_for_inference(load_from=str(tmp_path), device="cpu")


def test_别的分词器从头训练_旁注里的首尾是它的(tmp_path):
    write_tokenizer(tmp_path, "qwen")  # 2 号是 <|im_end|>，没有 bos
    spec = json.loads((tmp_path / "tokenizer_config.json").read_text("utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({**spec, "eos_token": "<|endoftext|>"}), "utf-8"
    )
    model, tokenizer = init_model(
        MiniMindConfig(hidden_size=64, num_hidden_layers=1), "none", tmp_path, device="cpu"
    )
    config = model.config
    assert (
        (config.bos_token_id, config.eos_token_id)
        == (1, 0)
        == tuple(tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|endoftext|>"]))
    )
