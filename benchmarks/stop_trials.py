"""退出信号的实测：在随机的时刻打断真的训练命令，看退出码、用时、有没有留下子进程、存下的是不是那一步。

    python benchmarks/stop_trials.py torchrun --trials 20       两个进程，SIGTERM 与 Ctrl-C
    python benchmarks/stop_trials.py compile --trials 20        编译途中
    python benchmarks/stop_trials.py recipes --trials 5         九个配方

对照是没打断过、每一步都存盘的一次：打断后的存档停在第 k 步，就与对照第 k 步的存档逐位比（权重、优化器、随机数、进度、
配方状态），相同则续训必然相同；另外每种情形的头一次真的续到底，与对照的最后一步比。打断的时刻：编译在开训之后，
其余在随机抽的一步之后，各再等随机的零点几秒。一个进程的命令由本进程 fork 出来，省下每次导入 torch 的十几秒。
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # fork 之后 OpenMP 的线程池不可用
import torch

import minimind.recipes.grpo  # noqa: F401  连同训练循环一起先导入
from minimind.trainer.archive import Archive

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--device", "cpu", "--preset", "tiny", "--dtype", "float32", "--batch_size", "2", "--accumulation_steps", "1", "--max_seq_len", "128", "--save_interval", "2", "--eval_interval", "3", "--log_interval", "1", "--val_max_rows", "4"]  # fmt: skip
RL = ["--num_generations", "2", "--max_gen_len", "64", "--from_weight", "full_sft"]
# 配方 → （脚本名，存档的名字，另加的参数）
RECIPES: dict[str, tuple[str, list[str]]] = {
    "pretrain": ("pretrain", []),
    "full_sft": ("full_sft", ["--from_weight", "none"]),
    "lora": ("lora_identity", []),
    "dpo": ("dpo", []),
    "distillation": ("full_dist", ["--student_hidden_size", "96", "--student_num_layers", "2"]),
    "reason": ("reason", ["--from_weight", "full_sft"]),
    "ppo": ("ppo_actor", RL),
    "grpo": ("grpo", RL),
    "spo": ("spo", ["--max_gen_len", "64", "--from_weight", "full_sft"]),
}
SIGNALS = {"SIGTERM": 143, "SIGINT": 130, "SIGHUP": 129}


class Command:
    """一条命令，自成一个会话，输出进文件；``keep`` 是把每一步的存档另存一份的地方。

    torchrun 把子进程的退出码藏起来，所以多进程时它起的是本脚本，本脚本再起训练并记下退出码。
    """

    def __init__(self, argv: list[str], folder: Path, processes: int, keep: Path | None = None):
        self.folder, self.log, self.mark = folder, folder / "output.txt", f"trial{random.random()}"
        self.processes, self.code = processes, None
        self.log.write_bytes(b"")
        for old in folder.glob("code.*"):
            old.unlink()
        self.pid = os.fork()
        if self.pid:
            return
        os.setsid()
        os.chdir(folder)
        for fd in (1, 2):
            os.dup2(os.open(self.log, os.O_WRONLY | os.O_APPEND), fd)
        os.environ |= {
            "STOP_TRIAL": self.mark,
            "PYTHONPATH": str(ROOT),
            "MINIMIND_CACHE": str(folder / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),  # 每次都从头编译
        }
        if processes > 1:
            launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            me = [__file__, "--child", str(keep or "")]
            os.execv(sys.executable, [sys.executable, "-m", *launcher, *me, *argv])
        run_script(argv, keep)

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def running(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code is None

    def wait(self, words: str | None = None) -> None:
        """等到退出，或者说出 ``words``。"""
        while self.running() and not (words and words in self.output()):
            time.sleep(0.02)

    def interrupt(self, name: str) -> float:
        """发信号（Ctrl-C 与 SIGHUP 像终端那样发给整个进程组），等它走；返回用了几秒。"""
        signum, begin = getattr(signal, name), time.monotonic()
        os.kill(self.pid, signum) if name == "SIGTERM" else os.killpg(self.pid, signum)
        self.wait()
        return time.monotonic() - begin

    def codes(self) -> list[int]:
        """各训练进程的退出码。"""
        if self.processes == 1:
            return [self.code]
        return [int(path.read_text()) for path in sorted(self.folder.glob("code.*"))]

    def left_behind(self) -> int:
        """还活着的子孙进程，靠环境变量认。"""
        found = 0
        for process in Path("/proc").glob("[0-9]*"):
            try:
                found += f"STOP_TRIAL={self.mark}".encode() in (process / "environ").read_bytes()
            except OSError:  # 刚好退出了，或不是自己的
                continue
        return found


def run_script(argv: list[str], keep: Path | None) -> None:
    """在本进程里运行训练脚本，到退出为止。"""
    if keep:
        original = Archive.write

        def write(archive: Archive, snapshot: dict, rng: list) -> None:
            original(archive, snapshot, rng)
            shutil.copy(next(Path("checkpoints").glob("*_resume.pth")), keep / f"{snapshot['step']}.pth")

        Archive.write = write
    sys.argv, code = argv, 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code
    os._exit(code or 0)


def child(keep: str, argv: list[str]) -> None:
    """torchrun 的子进程：起训练，自己不理信号，记下它的退出码并照样退出。"""
    pid = os.fork()
    if not pid:
        run_script(argv, Path(keep) if keep else None)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    Path(f"code.{os.environ['RANK']}").write_text(str(code))
    os._exit(code % 256)


def argv_of(recipe: str, steps: int, extra: list[str]) -> list[str]:
    options = [*TINY, *RECIPES[recipe][1], "--max_steps", str(steps), *extra]
    return [str(ROOT / "trainer" / f"train_{recipe}.py"), *options]


def state_of(path: Path) -> dict[str, Any]:
    """存档里不随时间变的部分。"""
    data = torch.load(path)
    data["progress"] |= {"seconds": 0, "interval": {**data["progress"]["interval"], "seconds": 0}}
    return {k: data[k] for k in ("model", "optimizer", "rng", "progress", "recipe_state")}


def same(a: Any, b: Any) -> bool:
    """嵌套的字典与列表逐位相同。"""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def trials(
    base: Path, what: str, recipe: str, count: int, names: list[str], steps: int, extra: list[str]
) -> list:
    """没打断的一次作对照，再打断各 ``count`` 次。"""
    dice, results, processes = random.Random(recipe), [], 2 if what == "torchrun" else 1
    keep, argv = base / f"keep-{what}-{recipe}", argv_of(recipe, steps, extra)
    keep.mkdir()

    def fresh() -> Path:
        folder = base / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base / "start", folder)
        return folder

    whole = Command([*argv, "--save_interval", "1"], fresh(), processes, keep)
    whole.wait("训练：")
    begin = time.monotonic()
    whole.wait()
    if whole.code or not (keep / f"{steps}.pth").exists():
        raise SystemExit(whole.output())
    step_seconds = (time.monotonic() - begin) / steps
    for name in [name for name in names for _ in range(count)]:
        run = Command(argv, fresh(), processes)
        if what == "compile":
            run.wait("训练：")
            time.sleep(dice.uniform(0, step_seconds * steps * 0.8))
        else:
            run.wait(f" {dice.randint(1, steps - 2)}/{steps} 步")
            time.sleep(dice.uniform(0, step_seconds))
        seconds = run.interrupt(name)
        said = run.output()
        saved = next((run.folder / "checkpoints").glob("*_resume.pth"), None)
        step = torch.load(saved)["step"] if saved else 0
        row = {"what": what, "recipe": recipe, "signal": name, "codes": run.codes(), "seconds": round(seconds, 2),
               "left": run.left_behind(), "step": step, "abandoned": "放弃了" in said or "第一步还没有走完" in said,
               "traceback": said.count("Traceback") - said.count("SignalException: "),
               "equal": step == 0 or same(state_of(saved), state_of(keep / f"{step}.pth"))}  # fmt: skip
        if not any(r["signal"] == name for r in results):
            again = Command([*argv, "--from_resume", "1"], run.folder, processes)
            again.wait()
            final = next((run.folder / "checkpoints").glob("*_resume.pth"))
            row["resumed"] = same(state_of(final), state_of(keep / f"{steps}.pth"))
        results.append(row)
        print(json.dumps(row, ensure_ascii=False), flush=True)
    return results


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", choices=("torchrun", "compile", "recipes"))
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--signals", default="SIGTERM,SIGINT")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    names, rows = args.signals.split(","), []
    with tempfile.TemporaryDirectory() as home:
        base = Path(home)
        (base / "start").mkdir()
        for recipe in ("pretrain", "full_sft"):  # 起点：微世界语料，两步的预训练与微调权重
            Command(argv_of(recipe, 2, []), base / "start", 1).wait()
        shutil.rmtree(base / "start" / "checkpoints")
        if "torchrun" in args.what:
            rows += trials(base, "torchrun", "pretrain", args.trials, names, 12, [])
        if "compile" in args.what:
            rows += trials(base, "compile", "pretrain", args.trials, names, 3, ["--use_compile", "1"])
        for recipe in args.recipes.split(",") if "recipes" in args.what else ():
            rows += trials(base, "recipes", recipe, args.trials, names, 8, [])
    for what in args.what:
        mine = [row for row in rows if row["what"] == what]
        good = [r for r in mine if set(r["codes"]) == {SIGNALS[r["signal"]]} and r["equal"] and not r["left"]
                and not r["traceback"] and r.get("resumed", True)]  # fmt: skip
        print(f"{what}：{len(good)}/{len(mine)} 次全对；最慢 {max(r['seconds'] for r in mine)} 秒，"
              f"放弃了手上那一步的 {sum(r['abandoned'] for r in mine)} 次")  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
