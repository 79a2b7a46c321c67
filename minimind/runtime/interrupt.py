"""训练途中的退出信号：走完这一步、存盘再走；这一步一时走不完（编译、很长的采样与验证），就放弃它，存下上一步。

“上一步”取得回来，因为一步之内先只算梯度，到头才改权重：改之前放弃，权重与优化器还是上一步的，再加上这一步开始时
记下的进度、随机数与配方状态（:meth:`minimind.trainer.archive.Archive.snapshot`），就是那时的全部。存盘由另一个线程做，主线程
停在原地，随进程一起结束。

多进程时，一个进程在最后一次归约之前放弃，谁的归约也完成不了，所以大家都还在同一步；各进程把自己的随机数状态交给
主进程，由它存盘。这些话不能走集合通信（主线程可能正占着它），走 torchrun 的键值存储。
"""

from __future__ import annotations

import io
import os
import threading
import time
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

from minimind import signals
from minimind.runtime import distributed

# 主进程等各进程交随机数状态，其余进程等主进程存完，都至多这么多秒
AGREE_SECONDS, SAVE_SECONDS = 4.0, 20.0
# 多进程时主线程在改权重、却这么久也走不完：有进程已经死了，等不到它
GIVE_UP_SECONDS = 20.0
POLL_SECONDS = 0.05


class Savable(Protocol):
    """能存下一份快照的东西，即 :class:`minimind.trainer.archive.Archive`；``state.saved_step`` 是最近存过盘的那一步。"""

    state: Any

    def write(self, snapshot: dict[str, Any], rng: list[dict[str, Any]]) -> None:
        """存下快照；``rng`` 是各进程的随机数状态。"""


class StopSignal:
    """``with StopSignal(archive) as stop:`` 期间把退出信号变成 ``stop.requested``；第二次信号立即离开。

    退出码按惯例是 128 + 信号号：SIGTERM 143，Ctrl-C 130，SIGHUP 129。

    Args:
        run: 一步走不完时由它存盘；``None`` 则只会等。
    """

    def __init__(self, run: Savable | None = None):
        self.run, self.signum = run, 0
        self.gate = threading.Lock()  # 放弃之后一直锁着，主线程再也走不到改权重的地方
        self.snapshot: dict[str, Any] | None = None
        self.open = False  # 现在可以放弃

    @property
    def requested(self) -> bool:
        return self.signum != 0

    def __enter__(self) -> StopSignal:
        self.context = signals.taken_by(self)
        self.context.__enter__()
        return self

    def __exit__(self, *exc_info) -> None:
        self.committed()  # 出去以后就不能再放弃
        self.context.__exit__(*exc_info)

    def whole(self, snapshot: dict[str, Any]) -> None:
        """刚走完完整的一步；从现在起到 :meth:`committed`，都可以放弃手上的事、退回 ``snapshot``。"""
        with self.gate:
            self.snapshot, self.open = snapshot, True

    def committed(self) -> None:
        """要改权重了（即将参加这一步最后的归约）：走完这一步才能停。"""
        with self.gate:
            self.open = False

    def signalled(self, signum: int) -> None:
        """见 :class:`minimind.signals.Taker`。"""
        if not self.requested:
            self.signum = signum
            signals.tell("收到退出信号，走完这一步就存盘离开；一时走不完就放弃这一步。再来一次立即离开。")

    def overdue(self, signum: int) -> None:
        """见 :class:`minimind.signals.Taker`；在另一个线程里。"""
        started, peers = time.monotonic(), None
        try:
            peers = Peers() if dist.is_initialized() else None
            while not self._abandon(peers):
                time.sleep(POLL_SECONDS)
                if peers and time.monotonic() - started > GIVE_UP_SECONDS:
                    signals.leave_now(signum, "别的进程没有走完这一步，不等了。")
            message = self._save(peers)
        except Exception as error:  # 磁盘满，别的进程已经死了，存储连不上：旧存档完好，离开要紧
            message = f"放弃了走不完的这一步，没能存盘（{error}）；存档还是原来的。"
        signals.leave_now(signum, message)

    def _abandon(self, peers: Peers | None) -> bool:
        """能放弃就放弃；主线程已经在改权重、在存盘时不能，它走完自会离开。"""
        if self.run is None or self.snapshot is None or not self.gate.acquire(timeout=POLL_SECONDS):
            return False
        if self.open or (peers and peers.abandoned(self.snapshot["step"])):
            return True
        self.gate.release()
        return False

    def _save(self, peers: Peers | None) -> str:
        """存下快照，返回告诉使用者的话。"""
        step = self.snapshot["step"]
        if step == 0:
            return "第一步还没有走完，没有要存的。"
        rng = [self.snapshot["rng"]] if peers is None else peers.exchange(step, self.snapshot["rng"])
        if self.run.state.saved_step != step and distributed.is_main_process():
            self.run.write(self.snapshot, rng)
        if peers is not None:
            peers.finish(step)
        return f"这一步一时走不完，放弃了它；已在第 {step} 步存盘，加 --from_resume 1 继续。"


class Peers:
    """进程之间不经过集合通信的几句话，走建进程组时用的那个键值存储。"""

    def __init__(self):
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        server = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*server, is_master=False, timeout=timedelta(seconds=AGREE_SECONDS))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"minimind/abandon/{attempt}", store)

    def abandoned(self, step: int) -> bool:
        """有没有哪个进程放弃了第 ``step`` 步之后的那一步。"""
        return self.store.check([f"{step}"])

    def exchange(self, step: int, rng: dict[str, Any]) -> list[dict[str, Any]]:
        """说一声放弃了，交出自己的随机数状态；主进程等齐，得到各进程的。

        Raises:
            RuntimeError: 有进程没有交。
        """
        buffer = io.BytesIO()
        torch.save(rng, buffer)
        self.store.set(f"{step}/rng/{self.rank}", buffer.getvalue())
        self.store.set(f"{step}", b"1")
        if self.rank:
            return []
        keys = [f"{step}/rng/{rank}" for rank in range(self.world_size)]
        self.store.wait(keys, timedelta(seconds=AGREE_SECONDS))
        return [torch.load(io.BytesIO(self.store.get(key)), weights_only=True) for key in keys]

    def finish(self, step: int) -> None:
        """主进程说存完了，其余的等到它说：先走的会让 torchrun 以为出了事，去杀还在存盘的。"""
        if self.rank == 0:
            self.store.set(f"{step}/done", b"1")
        else:
            self.store.wait([f"{step}/done"], timedelta(seconds=SAVE_SECONDS))
