"""反向时重算（--checkpoint_layers）：训练出的权重与不重算的逐位相同，存下的中间结果少得多；内存不够时说出该动哪个参数。"""

from __future__ import annotations

import json

import pytest
import torch
import torch._dynamo
from test_compiling import Packed, backend, packed_train  # noqa: F401  backend 是夹具
from trainer_helpers import assert_same_weights, saved_model, tiny_args, tiny_model, toy_train

from minimind.arguments import parse_args
from minimind.errors import UserError
from minimind.model.model_minimind import MiniMindModel
from minimind.rl.actor_critic import ActorCritic
from minimind.trainer.footprint import is_out_of_memory, remedies
from minimind.trainer.recipe import language_model_loss
from minimind.trainer.setup import recompute_layers
from minimind.trainer.train_args import TrainArguments


def weights(folder, model: dict) -> dict:
    return saved_model(folder, "toy_64_moe" if model.get("use_moe") else "toy_64")


def losses(result) -> list[float]:
    return [line["loss"] for line in map(json.loads, result.log.read_text().splitlines())]


@pytest.fixture
def recomputed(monkeypatch):
    """重算了几次：证明真的走了那条路。"""
    calls, original = [], MiniMindModel.recompute
    monkeypatch.setattr(
        MiniMindModel, "recompute", staticmethod(lambda *a, **kw: calls.append(1) or original(*a, **kw))
    )
    return calls


@pytest.mark.parametrize(
    "model", [{}, {"arch": "v3"}, {"use_moe": True}, {"dropout": 0.2}, {"use_moe": True, "dropout": 0.2}]
)
def test_打包训练_重算与不重算逐位相同(tmp_path, recomputed, model):
    """混合专家的均衡损失若算两遍、dropout 若换了随机数，这里就对不上。"""
    plain = packed_train(tmp_path / "0", model, max_steps=4)
    assert not recomputed
    for layers in (1, "all"):
        again = packed_train(tmp_path / str(layers), model, max_steps=4, checkpoint_layers=layers)
        assert_same_weights(weights(tmp_path / "0", model), weights(tmp_path / str(layers), model))
        assert losses(plain) == losses(again)
    assert len(recomputed) == 4 * 1 + 4 * 2


@pytest.mark.parametrize("model", [{}, {"use_moe": True}])
def test_编译之后也能重算_与只编译的逐位相同(tmp_path, backend, capsys, recomputed, model):  # noqa: F811
    packed_train(tmp_path / "a", model, max_steps=4, use_compile=1)
    torch._dynamo.reset()
    packed_train(tmp_path / "b", model, max_steps=4, use_compile=1, checkpoint_layers="all")
    said = capsys.readouterr().err
    assert said.count("都与不编译时一致") == 2 and "不编译" not in said.replace("都与不编译时一致", "")
    assert recomputed
    assert_same_weights(weights(tmp_path / "a", model), weights(tmp_path / "b", model))


def test_存下的中间结果少得多():
    model, held = tiny_model(num_hidden_layers=6, intermediate_size=512).train(), {}
    ids = torch.randint(3, 97, (2, 64))
    parameters = {p.data_ptr() for p in model.parameters()}
    for layers in ("0", "3", "all"):
        recompute_layers(model, layers)
        saved = []

        def keep(tensor):
            if tensor.data_ptr() not in parameters:
                saved.append(tensor.numel() * tensor.element_size())  # noqa: B023
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(ids, labels=ids)
        held[layers] = sum(saved)
    assert held["all"] < held["3"] < held["0"]
    assert held["all"] < held["0"] / 4


def test_续训时可以换_不影响结果(tmp_path):
    whole = {"schedule": "cosine", "epochs": 1, "rows": 12}
    toy_train(tmp_path / "a", **whole)

    class Stop(Exception):
        pass

    calls = []

    def dies(model, batch):
        calls.append(1)
        if len(calls) == 5:
            raise Stop
        return language_model_loss(model, batch)

    with pytest.raises(Stop):
        toy_train(tmp_path / "b", loss=dies, checkpoint_layers=2, save_interval=2, **whole)
    toy_train(tmp_path / "b", checkpoint_layers=0, from_resume=1, **whole)
    assert_same_weights(saved_model(tmp_path / "a"), saved_model(tmp_path / "b"))


def test_价值网络的主干也重算():
    both = ActorCritic(tiny_model())
    recompute_layers(both, "1")
    assert [m.gradient_checkpointing for m in both.modules() if isinstance(m, MiniMindModel)] == [1, 1]


@pytest.mark.parametrize(("word", "value"), [("0", "0"), ("2", "2"), ("all", "all")])
def test_收下层数与_all(word, value):
    assert parse_args(TrainArguments, ["--checkpoint_layers", word]).checkpoint_layers == value


@pytest.mark.parametrize("word", ["-1", "half", "1.5", ""])
def test_不是层数说出期望(word):
    with pytest.raises(UserError, match=r"--checkpoint_layers"):
        parse_args(TrainArguments, [f"--checkpoint_layers={word}"])


def test_比模型的层数还多是错误(tmp_path):
    with pytest.raises(
        UserError, match=r"--checkpoint_layers：要重算 3 层；期望：至多 2 层.*--checkpoint_layers all"
    ):
        toy_train(tmp_path, checkpoint_layers=3)


# ---------------------------------------------------------------- 内存不够


def out_of_memory(model, batch):
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of …"
    )


def test_内存不够时说出该动哪个参数(tmp_path):
    with pytest.raises(UserError) as caught:
        toy_train(tmp_path, loss=out_of_memory, batch_size=8, accumulation_steps=2, max_seq_len=512)
    said = str(caught.value)
    assert "CUDA out of memory. Tried to allocate 2.00 GiB." in said and "GPU 0" not in said
    assert "--batch_size 4 --accumulation_steps 4（现在 8 与 2" in said
    assert "--checkpoint_layers all（现在 0" in said and "--max_seq_len 256（现在 512" in said
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_训练到一半内存不够_此前的存档还在_照说的做就能续(tmp_path):
    calls = []

    def later(model, batch):
        calls.append(1)
        return out_of_memory(model, batch) if len(calls) == 5 else language_model_loss(model, batch)

    common = {"batch_size": 4, "max_steps": 6, "save_interval": 2}
    with pytest.raises(UserError, match=r"内存不够.*--batch_size 2 --accumulation_steps 2.*--from_resume 1"):
        toy_train(tmp_path, loss=later, **common)
    done = toy_train(
        tmp_path,
        **common | {"batch_size": 2, "accumulation_steps": 2},
        from_resume=1,
        checkpoint_layers="all",
    )
    assert done.step == 6


def test_已经到头的办法不提(tmp_path):
    args = tiny_args(tmp_path, batch_size=1, checkpoint_layers="all", max_seq_len=64)
    assert remedies(args) == "换小一号的 --preset，或内存大的设备"


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("NPU out of memory. Tried to allocate 20.00 MiB"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)  # fmt: skip
def test_认得各种设备的说法(error, is_one):
    assert is_out_of_memory(error) is is_one


def test_别的错误原样抛出(tmp_path):
    def broken(model, batch):
        raise RuntimeError("形状不对")

    with pytest.raises(RuntimeError, match="形状不对") as caught:
        toy_train(tmp_path, loss=broken)
    assert not isinstance(caught.value, UserError)
