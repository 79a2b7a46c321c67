"""init_model：缺权重、尺寸不符、分词器不配套，都是一句带修复办法的话。"""

from __future__ import annotations

import math

import pytest
import torch
from trainer_helpers import tiny_args

from minimind.arguments import parse_args
from minimind.errors import UserError
from minimind.inference.loading import load_for_inference
from minimind.model import MiniMindConfig, MiniMindForCausalLM, count_parameters
from minimind.model.model_minimind import rope_frequencies
from minimind.recipes.entry import open_model
from minimind.rl.arguments import RLArguments
from minimind.runtime.checkpoint import config_dict, save_weights, weights_path
from minimind.tokenizer import load_tokenizer, tokenizer_fingerprint
from minimind.trainer.recipe import language_model_loss
from minimind.trainer.train_args import TrainArguments
from minimind.trainer.trainer_utils import init_model, model_config, start_run

SIZES = {"hidden_size": 64, "num_hidden_layers": 2}


def small(**changes) -> MiniMindConfig:
    return MiniMindConfig(**{"hidden_size": 64, "num_hidden_layers": 2, **changes})


def store(folder, name="pretrain", sidecar=True, **changes) -> MiniMindForCausalLM:
    config = small(**changes)
    model = MiniMindForCausalLM(config)
    path = weights_path(config, name, folder)
    about = {"config": config_dict(config), "tokenizer_hash": tokenizer_fingerprint(load_tokenizer())}
    save_weights(model, path, about)
    if not sidecar:
        path.with_suffix(".json").unlink()
    return model


def test_从头与从权重(tmp_path):
    model, tokenizer = init_model(small(), "none", save_dir=tmp_path, device="cpu")
    assert len(tokenizer) == 6400 and all(p.dtype == torch.float32 for p in model.parameters())
    for sidecar in (True, False):
        saved = store(tmp_path, sidecar=sidecar)
        model, _ = init_model(small(), "pretrain", save_dir=tmp_path, device="cpu")
        for key, value in model.state_dict().items():
            assert torch.equal(value, saved.state_dict()[key].half().float())


def test_缺权重_说出文件与命令以及目录里有什么(tmp_path):
    store(tmp_path, hidden_size=128)
    with pytest.raises(UserError) as error:
        init_model(small(), "pretrain", save_dir=tmp_path, device="cpu")
    message = str(error.value)
    assert str(tmp_path / "pretrain_64.pth") in message and "pretrain_128.pth" in message
    assert "python trainer/train_pretrain.py --hidden_size 64" in message


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers 存档里是 2、现在是 3"),
        ({"arch": "v3"}, "arch 存档里是 'v2'、现在是 'v3'"),
        ({"num_attention_heads": 4}, "num_attention_heads"),
    ],
)
def test_尺寸与旁注不符_说出哪一项(tmp_path, changes, words):
    store(tmp_path)
    with pytest.raises(UserError, match=words):
        init_model(small(**changes), "pretrain", save_dir=tmp_path, device="cpu")


def test_没有旁注时尺寸不符_说出键与两边的形状(tmp_path):
    store(tmp_path, sidecar=False)
    with pytest.raises(UserError, match=r"gate_proj.weight 的形状是 \(192, 64\).*\(320, 64\)"):
        init_model(small(intermediate_size=320), "pretrain", save_dir=tmp_path, device="cpu")


def test_与训练无关的设置可以不同(tmp_path):
    store(tmp_path)
    init_model(small(dropout=0.1, flash_attn=False), "pretrain", save_dir=tmp_path, device="cpu")


def test_分词器不配套报错(tmp_path):
    config = small()
    path = weights_path(config, "pretrain", tmp_path)
    save_weights(MiniMindForCausalLM(config), path, {"config": config_dict(config), "tokenizer_hash": "别的"})
    with pytest.raises(UserError, match="--tokenizer_path"):
        init_model(small(), "pretrain", save_dir=tmp_path, device="cpu")


def test_预设与尺寸参数(tmp_path):
    assert model_config(tiny_args(tmp_path)).hidden_size == 64
    usual = {"hidden_size": 512, "num_hidden_layers": 8}
    assert model_config(tiny_args(tmp_path, preset="base", **usual)).num_hidden_layers == 16
    with pytest.raises(UserError, match="--preset"):
        model_config(tiny_args(tmp_path, preset="huge"))
    with pytest.raises(UserError, match="16 的倍数"):
        model_config(tiny_args(tmp_path, hidden_size=24))


@pytest.mark.parametrize(
    ("preset", "given", "words"),
    [
        ("base", {"hidden_size": 640}, r"--hidden_size.*640.*--preset base 的是 768"),
        ("tiny", {"num_hidden_layers": 12}, r"--num_hidden_layers.*12.*--preset tiny 的是 6"),
        ("small", {"use_moe": 1}, r"--use_moe.*1.*--preset small 的是 0(.|\n)*minimind3_moe"),
    ],
)
def test_预设之外另写的尺寸不悄悄收下(preset, given, words):
    with pytest.raises(UserError, match=words):
        TrainArguments(preset=preset, **given)
    with pytest.raises(UserError, match=words):
        parse_args(TrainArguments, ["--preset", preset, *flags(given)])
    same = {"hidden_size": 768, "num_hidden_layers": 16}
    assert parse_args(TrainArguments, ["--preset", "base", *flags(same)]).width == 768
    assert TrainArguments(preset="base", **same).width == 768
    assert TrainArguments(preset="moe", use_moe=1).width == 640


def flags(given):
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize(
    ("preset", "given"),
    [("base", {"hidden_size": 512}), ("moe", {"use_moe": 0}), ("tiny", {"num_hidden_layers": 8})],
)
def test_写明的值恰好是默认值也看得出(preset, given):
    with pytest.raises(UserError, match=f"--{next(iter(given))}"):
        parse_args(TrainArguments, ["--preset", preset, *flags(given)])
    assert parse_args(TrainArguments, flags(given)).preset is None


def test_初始损失接近均匀分布(tmp_path):
    start_run(tiny_args(tmp_path))
    for changes in ({}, {"arch": "v3"}, {"use_moe": True}):
        model, _ = init_model(small(**changes), "none", device="cpu")
        ids = torch.randint(10, 6400, (4, 64))
        loss, metrics = language_model_loss(model.train(), {"input_ids": ids, "labels": ids})
        ce = metrics.get("ce", loss)
        assert abs(ce.item() / (4 * 63) - math.log(6400)) < 0.1


def test_同一个种子得到同样的初始权重(tmp_path):
    models = []
    for seed in (1, 1, 2):
        start_run(tiny_args(tmp_path, seed=seed))
        models.append(init_model(small(), "none", device="cpu")[0])
    a, b, c = (m.model.embed_tokens.weight for m in models)
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert count_parameters(models[0]) == sum(p.numel() for p in models[0].parameters())


@pytest.mark.parametrize(
    ("optimizer", "residual", "embedding"), [("muon", 0.0, 0.005), ("adamw", 0.02, 0.02)]
)
def test_从头训练的初始化随优化器(tmp_path, optimizer, residual, embedding):
    """零初始化拖慢 AdamW；“要和从前一样”就得连初始化一起换回普通的正态。"""
    config = model_config(tiny_args(tmp_path, optimizer=optimizer))
    model = MiniMindForCausalLM(config)
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert projection.weight.std().item() == pytest.approx(residual, rel=0.1)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(embedding, rel=0.1)


def moe_args(folder, **changes):
    return tiny_args(folder, arch="v3", use_moe=1, optimizer="adamw", **changes)


def test_从头训练的v3混合专家_路由器从损失学得到东西(tmp_path):
    model, _ = init_model(model_config(moe_args(tmp_path)), "none", device="cpu")
    ids = torch.randint(10, 6400, (4, 64))
    model.train()(input_ids=ids, labels=ids).loss.backward()  # 不含负载均衡损失
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.norm() >= 1e-4
    dense_or_two = [{"arch": "v2", "use_moe": 1}, {"arch": "v2"}]
    assert all(model_config(tiny_args(tmp_path, **changes)).norm_topk_prob for changes in dense_or_two)


def test_接着训练v3混合专家_归一与否照原来的权重(tmp_path):
    """公开的没有旁注，按归一；自己从头训练的旁注里写着不归一。"""
    args = moe_args(tmp_path, from_weight="pretrain", save_dir=str(tmp_path))
    for own in (False, True):
        store(tmp_path, sidecar=own, arch="v3", use_moe=True, norm_topk_prob=not own)
        model, _ = init_model(model_config(args), "pretrain", save_dir=tmp_path, device="cpu")
        assert model.config.norm_topk_prob is not own
        assert model.model.layers[0].mlp.norm_topk is not own


def test_训练长度记在权重旁_YaRN由它外推(tmp_path):
    args = tiny_args(tmp_path, max_seq_len=48)
    model, _ = open_model(args)
    config = model.config
    assert config.trained_length == config.yarn["original_max_position_embeddings"] == 48
    about = {"config": config_dict(config), "tokenizer_hash": tokenizer_fingerprint(load_tokenizer())}
    save_weights(model, weights_path(config, "pretrain", args.save_dir), about)

    options = {"save_dir": args.save_dir, "weight": "pretrain", "device": "cpu", "dtype": "float32"}
    opened = load_for_inference(**options, inference_rope_scaling=True).model
    want = MiniMindConfig(
        **{**SIZES, "inference_rope_scaling": True}, rope_scaling={"original_max_position_embeddings": 48}
    )
    assert torch.equal(rope_frequencies(opened.config), rope_frequencies(want))
    wide = MiniMindConfig(**{**SIZES, "inference_rope_scaling": True})  # 不知道训练长度：2048
    assert not torch.equal(rope_frequencies(wide), rope_frequencies(want))

    # 接着训练：见过的最长
    for length, longest in ((20, 48), (96, 96)):
        tuned, _ = open_model(tiny_args(tmp_path, max_seq_len=length, from_weight="pretrain"))
        assert tuned.config.trained_length == longest
    reinforced = RLArguments(**{"max_seq_len": 20, "hidden_size": 64})
    assert reinforced.trained_length(48) == 48 and reinforced.trained_length(None) == 20
