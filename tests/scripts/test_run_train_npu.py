"""NPU 启动脚本：没有 NPU 也能测，PATH 上放一个只打印参数的 torchrun。"""

import os
import shutil
import subprocess

import pytest

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="没有 bash")


@pytest.fixture
def launch(root_dir, tmp_path):
    """运行脚本，返回 (退出码, torchrun 收到的参数, 报错)；环境里先去掉会影响结果的变量。"""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()

    def stand_in(name: str, body: str) -> None:
        path = bin_dir / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    stand_in("torchrun", 'echo "$@" "connect=$HCCL_CONNECT_TIMEOUT exec=$HCCL_EXEC_TIMEOUT"')
    # 真的 npu-smi 不该被用到
    stand_in("npu-smi", "exit 1")

    def run(*args: str, smi: str | None = None, **extra: str):
        if smi is not None:
            stand_in("npu-smi", f"cat <<'END'\n{smi}\nEND")
        drop = ("ASCEND", "HCCL", "NPROC", "MASTER", "NNODES", "NODE_RANK")
        env = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
        env |= {"PATH": f"{bin_dir}:{env['PATH']}", **extra}
        script = str(root_dir / "scripts" / "run_train_npu.sh")
        done = subprocess.run(["bash", script, *args], env=env, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout.split(), done.stderr

    return run


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_参数原样传给阶段脚本(launch, root_dir):
    code, words, _ = launch("pretrain", "--epochs", "1", "--batch_size", "32", smi=SMI)
    assert code == 0
    assert option(words, "--nproc_per_node") == "2"
    assert words[-7:-2] == [
        str(root_dir / "trainer" / "train_pretrain.py"),
        "--epochs",
        "1",
        "--batch_size",
        "32",
    ]


SMI = """\tNPU ID   Chip ID   Chip Logic ID   Chip Name
\t0        0         0               Ascend 910
\t0        1         -               Mcu
\t1        0         1               Ascend 910
\t1        1         -               Mcu"""


@pytest.mark.parametrize(
    ("env", "cards"),
    [
        ({"NPROC_PER_NODE": "2", "ASCEND_RT_VISIBLE_DEVICES": "0,1,2"}, "2"),
        ({"ASCEND_RT_VISIBLE_DEVICES": "0,3,5"}, "3"),
        ({"ASCEND_RT_VISIBLE_DEVICES": "0-3,6"}, "5"),
        ({"smi": SMI}, "2"),
    ],
)
def test_卡数的来源(launch, env, cards):
    _, words, _ = launch("pretrain", **env)
    assert option(words, "--nproc_per_node") == cards


@pytest.mark.parametrize("smi", [None, "", "\tNPU ID   Chip ID   Chip Logic ID   Chip Name", "没有驱动"])
def test_没有NPU应答_说清楚就停_不拿CPU顶替(launch, smi):
    code, words, error = launch("pretrain", smi=smi)
    assert code == 2 and words == []
    assert "没有 NPU 应答" in error and "NPROC_PER_NODE" in error and "train_pretrain.py" in error


def test_使用者设过的超时与端口不改(launch):
    _, words, _ = launch("pretrain", smi=SMI, HCCL_CONNECT_TIMEOUT="7", MASTER_PORT="12345")
    assert "connect=7" in words
    assert option(words, "--master_port") == "12345"
    _, words, _ = launch("pretrain", smi=SMI)
    assert "connect=1200" in words and "exec=1800" in words


def test_多机参数只在给出时传递(launch):
    _, words, _ = launch("pretrain", smi=SMI, NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1")
    assert (option(words, "--nnodes"), option(words, "--node_rank")) == ("2", "1")
    assert option(words, "--master_addr") == "10.0.0.1"


@pytest.mark.parametrize(
    ("args", "env", "said"),
    [
        ((), {}, "没有给出训练阶段"),
        (("pretrian",), {}, "pretrain"),
        (("pretrain",), {"NPROC_PER_NODE": "x"}, "正整数"),
    ],
)
def test_写错了退出码非零且说出怎么改(launch, args, env, said):
    code, words, error = launch(*args, **env)
    assert code == 2 and words == []
    assert said in error
