"""参考模型：它的对数概率训练前算一遍存下来，训练时不必再带着第二个模型；它由训练的起点来，起点随续训存档走。

缓存放在分词缓存旁边（``.cache/minimind/reference/``），键由数据指纹与参考权重的内容决定：换了数据、截断长度、
分词器、目标的掩码或参考权重都会重算；续训、换学习率再训一次都直接读。整个文件夹随时可以删。
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from minimind.console import progress, say
from minimind.dataset.cache import cache_root
from minimind.dataset.collate import to_device
from minimind.errors import UserError
from minimind.objectives.preference import sequence_logprobs
from minimind.runtime import checkpoint, distributed
from minimind.runtime.checkpoint import atomic_write, load_file
from minimind.runtime.device import autocast_context, preserved_rng
from minimind.runtime.files import file_lock
from minimind.runtime.shapes import check_plain
from minimind.runtime.weights import STRUCTURE
from minimind.trainer.recipe import Data

# 按长度排好再切批，免得短的陪长的填充；一次只取这么多批来排，大数据也不必先全读一遍
SORTED_BATCHES = 64


def weights_hash(model: nn.Module) -> str:
    """权重内容的指纹：键、形状与逐字节的值。"""
    digest = hashlib.blake2b(digest_size=12)
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def pair_logprobs(
    model: nn.Module, pairs: Dataset, *, batch_size: int, dtype: torch.dtype, description: str
) -> Tensor:
    """每一对的 ``[好, 坏]`` 对数概率之和，``[P, 2]`` fp32；多进程时各算一份再合起来。

    Args:
        model: 参考模型，已在设备上。
        pairs: :class:`minimind.dataset.DPODataset`。
        batch_size: 一次多少对。
        dtype: 前向的精度。
        description: 进度条上的字。
    """
    device, was_training = next(model.parameters()).device, model.training
    rank, world = distributed.rank(), distributed.world_size()
    mine, result = range(rank, len(pairs), world), torch.zeros(len(pairs), 2)
    model.eval()
    with (
        preserved_rng(device),
        autocast_context(device, dtype),
        progress(description, total=len(mine), unit="对") as bar,
    ):
        for block in range(0, len(mine), batch_size * SORTED_BATCHES):
            indices = mine[block : block + batch_size * SORTED_BATCHES]
            items = sorted(((pairs[i], i) for i in indices), key=lambda pair: longest_side(pair[0]))
            for start in range(0, len(items), batch_size):
                batch, ids = zip(*items[start : start + batch_size])
                logps = sequence_logprobs(model, to_device(pairs.collate(list(batch)), device, dtype)).logps
                result[list(ids)] = logps.cpu().view(2, -1).T
                bar.advance(len(ids))
    model.train(was_training)
    return sum(distributed.gather_objects(result)) if world > 1 else result


def longest_side(item: dict[str, Any]) -> int:
    return max(len(value) for value in item.values() if isinstance(value, Tensor))


def cached_pair_logprobs(
    model: nn.Module,
    pairs: Any,
    *,
    key: str,
    batch_size: int,
    dtype: torch.dtype,
    cache_dir: str | Path | None = None,
    description: str = "参考模型",
) -> Tensor:
    """同 :func:`pair_logprobs`，算过就从缓存里读。

    Args:
        key: 参考权重的指纹（:func:`weights_hash`）。
        cache_dir: 见 :func:`minimind.dataset.cache.cache_root`。
    """
    identity = f"{pairs.fingerprint} {key} {dtype}".encode()
    name = hashlib.blake2b(identity, digest_size=12).hexdigest()
    path = cache_root(cache_dir) / "reference" / f"{name}.pt"
    with contextlib.ExitStack() as held:

        def look() -> Tensor | None:
            """没有就拿着锁再看一眼：同时跑的另几次训练（例如扫 beta）只有一个算，其余等它算完来读。"""
            if (found := _stored(path, len(pairs))) is None:
                held.enter_context(_lock(path, description))
                found = _stored(path, len(pairs))
            return found

        # 只由主进程决定有没有，各进程才会一起算或一起读（各机器的缓存可以不同）
        stored = distributed.broadcast_object(distributed.on_main(look))
        if stored is not None:
            say(f"{description}的对数概率读自缓存 {path}。")
            return stored
        logps = pair_logprobs(model, pairs, batch_size=batch_size, dtype=dtype, description=description)
        distributed.on_main(
            lambda: atomic_write(path, lambda file: torch.save(logps, file), "环境变量 MINIMIND_CACHE")
        )
    return logps


def _stored(path: Path, pairs: int) -> Tensor | None:
    """存着的参考值；没有、读不出来（断电截短）或对数不符时为 None，重算就是。"""
    if not path.is_file():
        return None
    try:
        logps = load_file(path)
    except UserError:
        say(f"参考值的缓存 {path} 读不出来，重新算。")
        return None
    return logps if isinstance(logps, Tensor) and logps.shape == (pairs, 2) else None


@contextlib.contextmanager
def _lock(path: Path, description: str) -> Iterator[None]:
    wait = f"另一个进程正在算同一份{description}的对数概率，等它算完。"
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(file_lock(path.with_suffix(".lock"), lambda: say(wait)))
        except OSError as error:
            raise UserError(
                f"写不了参考值的缓存（{error.strerror}）",
                where=str(path.parent),
                fix="用环境变量 MINIMIND_CACHE 指到一个可写的目录，或用 --cache_reference 0",
            ) from error
        yield


class PairsWithReference(Dataset):
    """给每一对附上参考模型的对数概率；``logps`` 为 ``None`` 时原样（训练时现算）。

    Args:
        pairs: :class:`minimind.dataset.DPODataset`。
        logps: ``[P, 2]``，见 :func:`pair_logprobs`。
        key: 参考权重的指纹，并入数据指纹：续训时换了参考模型会被发现。
    """

    def __init__(self, pairs: Any, logps: Tensor | None, key: str):
        self.pairs, self.logps = pairs, logps
        self.num_documents, self.stats = pairs.num_documents, pairs.stats
        self.fingerprint = f"{pairs.fingerprint}/参考 {key}"

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.pairs[index]
        return item if self.logps is None else {**item, "reference": self.logps[index]}

    def source_lines(self, index: int) -> list[int]:
        """源文件里的行号，从 1 起。"""
        return self.pairs.source_lines(index)

    def source_names(self, index: int) -> list[str]:
        """源文件，与行号一一对应。"""
        return self.pairs.source_names(index)

    def collate(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """偏好对的批，另有 ``reference_logps`` ``[2B]``：前 B 个是好的，后 B 个是坏的。"""
        batch = self.pairs.collate(items)
        if self.logps is not None:
            batch["reference_logps"] = torch.stack([item["reference"] for item in items]).T.flatten()
        return batch


def with_reference(data: Data, model: nn.Module, batch_size: int, dtype: torch.dtype, cached: bool) -> Data:
    """训练集与验证集都附上参考模型的对数概率。

    Args:
        model: 参考模型，即训练的起点。
        batch_size, dtype: 见 :func:`pair_logprobs`。
        cached: 现在算好（或读自缓存）；否则只记下参考模型的指纹，训练时现算。
    """
    key = weights_hash(model)

    def attach(pairs: Any, name: str) -> PairsWithReference | None:
        if pairs is None:
            return None
        options = {"key": key, "batch_size": batch_size, "dtype": dtype, "description": name}
        return PairsWithReference(
            pairs, cached_pair_logprobs(model, pairs, **options) if cached else None, key
        )

    return Data(attach(data.train, "参考模型（训练集）"), attach(data.val, "参考模型（验证集）"))


# ---------------------------------------------------------------- 起点


class StartingPoint:
    """训练开始时的权重，参考模型由它来；整个放进续训存档（``extra_state``）。

    只记下文件的名字不够：``from_weight`` 与 ``save_weight`` 同名时，那个文件一存盘就被改写了。

    Args:
        args: 需要 ``from_resume from_weight save_weight checkpoint_dir``。
        model: 刚由 ``from_weight`` 打开的模型；续训时就地换成存档里的起点，由它得出的一切（参考模型、价值网络的初值、
            参考概率的缓存键）于是与当初一样。随后训练循环再装入存档里训练到一半的权重。
    """

    def __init__(self, args: Any, model: nn.Module):
        saved, weight, folder = None, args.save_weight, args.checkpoint_dir
        if args.from_resume:
            saved = distributed.broadcast_state(
                distributed.on_main(lambda: self._saved(weight, folder, model)), model.device
            )
        if saved is not None:
            if args.from_weight not in ("none", weight):
                self._check_same(saved, args.from_weight, model)
            model.load_state_dict(saved)
        self.state = {name: exact_half(value) for name, value in model.state_dict().items()}

    @staticmethod
    def _saved(weight: str, folder: str, model: Any) -> dict[str, Tensor] | None:
        from minimind.trainer.intact import WHOLE, check_whole  # 从头训练的用不着

        data = checkpoint.lm_checkpoint(model.config, weight, save_dir=folder)
        if data is None:
            return None
        where = checkpoint.resume_path(model.config, weight, folder)
        check_whole(data, str(where))
        now = checkpoint.config_dict(model.config)
        same = all(data["config"].get(name) == now.get(name) for name in STRUCTURE)
        if "start" not in data["recipe_state"] or not same:
            return None  # 参数、结构不同的随后由训练循环逐项指出
        found, part = data["recipe_state"]["start"], f"{where} 的 recipe_state/start"
        check_plain(found, part, WHOLE)
        checkpoint.check_state(model, found, part, WHOLE)
        return found

    @staticmethod
    def _check_same(saved: dict[str, Tensor], from_weight: str, model: Any) -> None:
        """存盘改写不到的起点文件若换了内容，多半是拿错了：说出来，不悄悄用旧的。

        Raises:
            UserError: ``from_weight`` 的内容与存档里的起点不同。
        """
        own = model.state_dict()
        if any(not torch.equal(own[key].cpu(), value.to(own[key].dtype)) for key, value in saved.items()):
            raise UserError(
                "起点的权重（参考模型由它来）与存档里的不同：文件后来换过",
                where=f"--from_weight {from_weight}",
                expected="与开始训练时同一份权重",
                fix="放回原来的权重，或去掉 --from_resume 重新训练",
            )

    def state_dict(self) -> dict[str, Tensor]:
        return self.state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """建立时已经读过。"""


def exact_half(value: Tensor) -> Tensor:
    """内存里的一份拷贝；转 fp16 一位不丢的（由 ``.pth`` 读来的都是）存 fp16，省一半。"""
    half = value.detach().half()
    exact = value.is_floating_point() and torch.equal(half.to(value.dtype), value)
    return (half if exact else value.detach()).cpu().clone()
