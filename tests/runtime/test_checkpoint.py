"""存档：原子、磁盘满时旧文件完好、键名与形状对不上说得清。"""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trainer_helpers import in_processes, tiny_config, tiny_model, toy_train

from minimind.errors import UserError
from minimind.runtime import checkpoint
from minimind.runtime.checkpoint import (
    atomic_write,
    half_state_dict,
    lm_checkpoint,
    load_file,
    load_weights,
    read_sidecar,
    save_weights,
    strip_prefixes,
    unwrap,
)


def test_权重是普通的fp16状态字典且共享张量只占一份(tmp_path):
    model = tiny_model()
    path = tmp_path / "w.pth"
    save_weights(model, path, {"config": {}})
    state = torch.load(path, weights_only=True)
    assert list(state) == list(model.state_dict())
    for key, value in state.items():
        assert value.dtype == torch.float16 and value.is_contiguous()
        assert torch.equal(value, model.state_dict()[key].half())
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    assert path.stat().st_size < 2.2 * sum(p.numel() for p in model.parameters()) + 20_000
    assert read_sidecar(path)["format_version"] == 1


def test_存了再读逐位相同(tmp_path):
    model, other = tiny_model(1), tiny_model(2)
    save_weights(model, tmp_path / "w.pth", {})
    load_weights(other, tmp_path / "w.pth")
    assert all(torch.equal(v, half_state_dict(model)[k]) for k, v in half_state_dict(other).items())


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_旧项目没有旁注或带前缀或缺输出层的权重能读(tmp_path, prefix):
    state = {prefix + k: v.half() for k, v in tiny_model(1).state_dict().items() if k != "lm_head.weight"}
    torch.save(state, tmp_path / "w.pth")
    assert read_sidecar(tmp_path / "w.pth") is None
    model = tiny_model(2)
    load_weights(model, tmp_path / "w.pth")
    assert torch.equal(model.lm_head.weight.half(), tiny_model(1).lm_head.weight.half())


def test_键或形状对不上_指出文件键与两边的形状(tmp_path):
    path = tmp_path / "w.pth"
    save_weights(tiny_model(), path, {})
    with pytest.raises(UserError) as error:
        load_weights(tiny_model(hidden_size=32), path)
    message = str(error.value)
    assert (
        str(path) in message and "embed_tokens" in message and "(97, 64)" in message and "(97, 32)" in message
    )
    with pytest.raises(UserError, match=r"缺少 \d+ 个键（如 model.layers.2"):
        load_weights(tiny_model(num_hidden_layers=3), path)
    with pytest.raises(UserError, match=r"多出 \d+ 个键（如 model.layers.1"):
        load_weights(tiny_model(num_hidden_layers=1), path)
    with pytest.raises(UserError, match=r"缺少.*多出|多出.*缺少"):
        load_weights(tiny_model(use_moe=True), path)


def test_读失败时模型原样不动(tmp_path):
    save_weights(tiny_model(1), tmp_path / "w.pth", {})
    model = tiny_model(2, num_hidden_layers=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError):
        load_weights(model, tmp_path / "w.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"])
def test_坏文件报人话(tmp_path, content):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(UserError, match="读不了"):
        load_weights(tiny_model(), tmp_path / "w.pth")


def test_续训存档当权重读会提示(tmp_path):
    toy_train(tmp_path, max_steps=1)
    with pytest.raises(UserError, match="--from_resume"):
        load_weights(tiny_model(), tmp_path / "checkpoints" / "toy_64_resume.pth")


def test_拆外壳与去前缀(tmp_path):
    model = tiny_model()
    assert unwrap(torch.compile(model, backend="eager")) is model
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        wrapped = DistributedDataParallel(torch.compile(model, backend="eager"))
        assert unwrap(wrapped) is model
        assert set(strip_prefixes(wrapped.state_dict())) == set(model.state_dict())
    finally:
        torch.distributed.destroy_process_group()


def test_存读续训存档的公开接口(tmp_path):
    config, model = tiny_config(), tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())

    class Run:
        id = "abc"

    assert lm_checkpoint(config, "x", save_dir=tmp_path) is None
    extra = {"critic": nn.Linear(2, 2), "scores": [1.0, 2.0]}
    lm_checkpoint(
        config,
        "x",
        model=model,
        optimizer=optimizer,
        epoch=1,
        step=9,
        wandb=Run(),
        save_dir=tmp_path,
        **extra,
    )
    data = lm_checkpoint(config, "x", save_dir=tmp_path)
    assert (data["epoch"], data["step"], data["world_size"], data["wandb_id"]) == (1, 9, 1, "abc")
    assert set(data["critic"]) == {"weight", "bias"} and data["scores"] == [1.0, 2.0]
    assert (tmp_path / "x_64_resume.pth").is_file()


def test_比程序新的存档格式报错(tmp_path, monkeypatch):
    lm_checkpoint(tiny_config(), "x", model=tiny_model(), save_dir=tmp_path)
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 0)
    with pytest.raises(UserError, match="升级"):
        lm_checkpoint(tiny_config(), "x", save_dir=tmp_path)


# ---------------------------------------------------------------- 原子与磁盘满


def failing_write(at: int):
    """写到第 ``at`` 个字节时磁盘满。"""

    def write(file):
        file.write(b"x" * at)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return write


def test_写一半出错旧文件完好且没有临时文件(tmp_path):
    path = tmp_path / "a.bin"
    atomic_write(path, lambda file: file.write(b"old"))
    with pytest.raises(UserError, match=r"No space left.*原有文件未动.*磁盘空间"):
        atomic_write(path, failing_write(100))
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]
    with pytest.raises(ZeroDivisionError):  # 不是磁盘的错，照样清理，原样抛出
        atomic_write(path, lambda file: 1 / 0)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_目录不可写报人话(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="保存失败"):
        atomic_write(tmp_path / "file" / "a.bin", lambda file: file.write(b"x"))


def save_under_limit(folder, limit, **settings):
    """限制本进程能写的文件大小：真的系统调用失败，torch.save 走的是真路径。"""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    toy_train(folder, **settings)


@pytest.mark.parametrize("limit", [50_000, 400_000])
def test_训练中磁盘写满_一句话退出码2_旧存档完好(tmp_path, limit):
    """限 50 KB 时权重都存不下，限 400 KB 时权重存得下、续训存档存不下。"""
    toy_train(tmp_path, max_steps=2)
    files = [tmp_path / "out" / "toy_64.pth", tmp_path / "checkpoints" / "toy_64_resume.pth"]
    before = [file.read_bytes() for file in files]
    log = tmp_path / "log.txt"
    codes = in_processes(
        1, save_under_limit, folder=tmp_path, limit=limit, from_resume=1, max_steps=4, log=log
    )
    text = log.read_text()
    assert codes == [2], text
    assert "错误：" in text and "原有文件未动" in text and "Traceback" not in text
    assert files[1].read_bytes() == before[1]
    if limit == 50_000:
        assert files[0].read_bytes() == before[0]
    load_file(files[0]), load_file(files[1])
    assert not list(tmp_path.rglob("*.tmp"))
    assert toy_train(tmp_path, from_resume=1, max_steps=4).step == 4  # 腾出空间后接着来


def test_真的小磁盘写满(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("没有挂载 tmpfs 的权限")
    try:
        with pytest.raises(UserError, match="No space left"):
            save_weights(tiny_model(hidden_size=128), disk / "w.pth", {})
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_存盘途中被杀_旧文件完好(tmp_path):
    path = tmp_path / "w.pth"
    save_weights(tiny_model(1), path, {})
    before = path.read_bytes()

    def die_midway():
        def write(file):
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        atomic_write(path, write)

    assert in_processes(1, die_midway) == [-signal.SIGKILL]
    assert path.read_bytes() == before
    save_weights(tiny_model(1), path, {})  # 残留的临时文件被下一次存盘覆盖
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.json", "w.pth"]


def test_旁注坏了报人话(tmp_path):
    (tmp_path / "w.json").write_text("{oops")
    with pytest.raises(UserError, match="不是合法的 JSON"):
        read_sidecar(tmp_path / "w.pth")


def test_旁注足以重建配置(tmp_path):
    from minimind.model import MiniMindConfig

    result = toy_train(tmp_path, max_steps=1, model={"arch": "v3", "dropout": 0.1})
    saved = json.loads(result.weights.with_suffix(".json").read_text())
    rebuilt = MiniMindConfig(**saved["config"])
    original = tiny_config(arch="v3", dropout=0.1)
    assert rebuilt.to_dict() == original.to_dict()
    assert saved["recipe"] == "pretrain" and saved["metrics"]["train_loss"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="目录刷盘只在 Linux 上查得到")
def test_文件与目录都刷盘(tmp_path, monkeypatch):
    synced = []
    original = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), original(fd))
    )
    atomic_write(tmp_path / "a", lambda file: file.write(b"x"))
    assert len(synced) == 2 and synced[1] == str(tmp_path)
    assert re.fullmatch(re.escape(str(tmp_path / ".a.")) + r"[0-9a-f-]+\.tmp", synced[0])
