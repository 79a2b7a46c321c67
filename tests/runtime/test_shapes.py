"""坏权重在装进模型之前就拒绝：说出文件、键、看到什么、怎么办。"""

from __future__ import annotations

import pytest
import torch
from trainer_helpers import tiny_model

from minimind.errors import UserError
from minimind.model.model_lora import apply_lora, load_adapter
from minimind.runtime.adapters import read_adapter
from minimind.runtime.checkpoint import load_weights, read_sidecar, save_weights

KEY = "model.layers.1.mlp.up_proj.weight"


def poisoned(value: float) -> dict:
    state = tiny_model(1).state_dict()
    state[KEY] = state[KEY].clone()
    state[KEY][3, 5] = value
    return state


BAD = {
    "nan": (lambda: poisoned(float("nan")), rf"{KEY} \(\d+, 64\) 里有 1 个数是 NaN 或无穷"),
    "inf": (lambda: poisoned(float("-inf")), KEY),
    "整数键": (lambda: {**tiny_model(1).state_dict(), 7: torch.zeros(1)}, "有一个键是 7（int）"),
    "int8": (
        lambda: {k: (v * 50).to(torch.int8) for k, v in tiny_model(1).state_dict().items()},
        "类型是 int8",
    ),
    "复数": (lambda: {**tiny_model(1).state_dict(), KEY: torch.zeros(2, dtype=torch.complex64)}, "complex64"),
    "稀疏": (lambda: {**tiny_model(1).state_dict(), KEY: torch.eye(3).to_sparse()}, "sparse_coo"),
    "同一个参数两份": (
        lambda: {**(state := tiny_model(1).state_dict()), f"module.{KEY}": state[KEY] + 1},
        "(\\d+) 个键只剩",
    ),
    "不是张量": (lambda: {"model": tiny_model(1).state_dict()}, "不是普通的权重字典"),
    "列表": (lambda: [torch.zeros(1)], "不是普通的权重字典"),
}


@pytest.mark.parametrize("case", BAD)
def test_坏权重拒绝_模型一位不动(tmp_path, case):
    make, words = BAD[case]
    torch.save(make(), tmp_path / "w.pth")
    model = tiny_model(2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=words) as error:
        load_weights(model, tmp_path / "w.pth")
    assert str(tmp_path / "w.pth") in str(error.value) and "修复办法" in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_没有共享的输出层不悄悄盖掉词嵌入(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(tiny_model(1, tie_word_embeddings=False).state_dict(), path)
    with pytest.raises(UserError) as error:
        load_weights(tiny_model(2), path)
    for word in (str(path), "lm_head.weight (97, 64)", "model.embed_tokens.weight", "tie_word_embeddings"):
        assert word in str(error.value)
    untied = tiny_model(2, tie_word_embeddings=False)
    load_weights(untied, path)
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("text", "words"),
    [('{"format_version": 99}', "格式版本 99"), ('{"format_version": "x"}', "格式版本 'x'"), ("[1]", "不是一个对象"),
     ('{"config": 3}', "不是一个对象"), ("{", "不是合法的 JSON")],
)  # fmt: skip
def test_旁注不对就拒绝(tmp_path, text, words):
    save_weights(tiny_model(), tmp_path / "w.pth", {})
    (tmp_path / "w.json").write_text(text)
    with pytest.raises(UserError, match=words):
        read_sidecar(tmp_path / "w.pth")


def test_LoRA_的秩超过矩阵的短边就拒绝(tmp_path):
    with pytest.raises(ValueError, match=r"秩 4096 超过各层的短边.*秩至多 64"):
        apply_lora(tiny_model(), rank=4096)
    assert apply_lora(tiny_model(), rank=64)
    name = "model.layers.0.self_attn.q_proj.lora"
    torch.save(
        {f"{name}.A.weight": torch.zeros(4096, 64), f"{name}.B.weight": torch.zeros(64, 4096)},
        tmp_path / "l.pth",
    )
    adapter, _ = read_adapter(tmp_path / "l.pth")
    with pytest.raises(ValueError, match="秩 4096"):
        load_adapter(tiny_model(), adapter)


def test_LoRA_文件里的坏数也拒绝(tmp_path):
    name = "model.layers.0.self_attn.q_proj.lora"
    torch.save(
        {f"{name}.A.weight": torch.full((2, 64), torch.nan), f"{name}.B.weight": torch.zeros(64, 2)},
        tmp_path / "l.pth",
    )
    with pytest.raises(UserError, match=r"A\.weight.*NaN"):
        read_adapter(tmp_path / "l.pth")
