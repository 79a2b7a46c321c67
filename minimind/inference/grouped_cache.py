"""CPU 上的 KV 缓存：每行的容量跟着自己的长度走，一条长的不会让所有的行都变长。

容量凑成几档（:func:`room_for`），同一档的几行并排放在一组里，一组一次注意力；长的行一行一组。一行写满了搬到大一档的组，
只抄用到的部分；离场的位置由同一档别的行补上，空了的组立刻还掉。注意力只看各组自己的长度。

占的内存不超过各行要的 :data:`LIMIT` 倍，另加凑档的零头（一行至多 31 个位置，再长至多八分之一）：宽裕时一组开足，留着空位等
别的行；紧了就只开够用的，离场之后也收紧。26M 一步里每多一组约多 0.1 毫秒。
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = 32  # 容量至少是它的倍数
LIMIT = 1.25  # 占的比要的多到这么多倍，就不再留空位
GROUP_POSITIONS, GROUP_ROWS = 512, 8  # 一组最多多少个位置、多少行；放不下两行的就一行一组


def room_for(length: int) -> int:
    """放得下 ``length`` 个位置的最小一档：512 以内每 32 一档，再长每翻一倍分八档，空着的不超过八分之一。"""
    unit = max(UNIT, 1 << max(0, (length - 1).bit_length() - 4))
    return -(-length // unit) * unit


class Group:
    """同一档的几行：``store [层, 行, 2·H_kv, 容量, D]``，第 i 行归槽位 ``owners[i]``；``alone`` 的不让别的行进来。"""

    def __init__(self, store: Tensor, alone: bool):
        self.store, self.alone = store, alone
        self.owners: list[int] = []

    @property
    def capacity(self) -> int:
        return self.store.shape[3]

    @property
    def full(self) -> bool:
        return self.alone or len(self.owners) == self.store.shape[1]


class GroupedKVCache:
    """按容量分组的 KV 缓存；一个槽位用之前先 :meth:`open`，离场时 :meth:`free`。"""

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int, *, dtype: torch.dtype):
        self.shape, self.dtype = (num_layers, num_kv_heads, head_dim), dtype
        self.groups: list[Group] = []
        self.version = 0  # 哪一行在哪一组变过几次
        self._home: dict[int, tuple[Group, int]] = {}
        self._used: dict[int, int] = {}
        self._room: dict[int, int] = {}
        self._need: dict[int, int] = {}
        self._needed = self._taken = 0  # 各行一共要多少个位置，占着多少个

    @property
    def capacity(self) -> int:
        """最长的一行放得下多少个位置。"""
        return max(self._room.values(), default=0)

    @property
    def nbytes(self) -> int:
        """占了多少字节。"""
        return sum(group.store.nbytes for group in self.groups)

    def row(self, slot: int) -> Tensor:
        """``[层, 2·H_kv, 容量, D]``，前一半头是 K。"""
        group, place = self._home[slot]
        return group.store[:, place]

    def room(self, slot: int) -> int:
        """这一行放得下多少个位置。"""
        return self._room[slot]

    def open(self, slot: int, length: int, alone: bool = False) -> None:
        """给一个新来的行留 ``length`` 个位置；``alone`` 表示还没写（提示读到一半），不与在写的放在一组。"""
        self.free([slot])
        self._ask(slot, length)
        self._settle(slot, length, alone)
        self._used[slot] = 0

    def reserve(self, slot: int, length: int) -> None:
        """就要写到第 ``length`` 个位置了；放不下就搬到大一档的组，只抄用到的。"""
        if slot not in self._home:
            self.open(slot, length)
        elif length > self._room[slot]:
            old, used = self.row(slot), self._used[slot]
            group, place = self._home[slot]
            fresh = self._settle(slot, length, group.alone)
            fresh[:, :, :used] = old[:, :, :used]
            self._vacate(group, place)
        self._ask(slot, max(length, self._need[slot]))
        self._used[slot] = length

    def copy(self, source: int, target: int, length: int) -> None:
        """``source`` 的前 ``length`` 个位置抄给新来的 ``target``。"""
        self.open(target, max(length, self._need[source]))
        self._used[target] = length
        self.row(target)[:, :, :length] = self.row(source)[:, :, :length]

    def move(self, source: int, target: int) -> None:
        """槽位换个号码，内容不动；单独放着的从此与别的行放在一起。"""
        self.free([target])
        group, place = self._home.pop(source)
        group.owners[place] = target
        self._home[target] = group, place
        for table in (self._used, self._room, self._need):
            table[target] = table.pop(source)
        self.version += 1
        if group.alone and self._rows(group.capacity) > 1:
            old, used = group.store[:, place], self._used[target]
            self._settle(target, group.capacity, False)[:, :, :used] = old[:, :, :used]
            self._vacate(group, place)
        group.alone = False

    def free(self, slots: list[int]) -> None:
        """这些槽位离场。"""
        for slot in slots:
            home = self._home.pop(slot, None)
            if home is not None:
                self._needed -= self._need.pop(slot)
                del self._used[slot], self._room[slot]
                self._vacate(*home)

    # ---------------------------------------------------------------- 组

    def _ask(self, slot: int, length: int) -> None:
        """这一行一共要 ``length`` 个位置。"""
        self._needed += length - self._need.get(slot, 0)
        self._need[slot] = length

    def _tight(self, extra: int) -> bool:
        """再占 ``extra`` 个位置会不会太多。"""
        return self._taken + extra > LIMIT * self._needed

    @staticmethod
    def _rows(capacity: int) -> int:
        return max(1, min(GROUP_ROWS, GROUP_POSITIONS // capacity))

    def _settle(self, slot: int, length: int, alone: bool) -> Tensor:
        """找一个空位置住下，没有就开一组；返回那一行。"""
        capacity = room_for(length)
        most = 1 if alone else self._rows(capacity)
        mine = [one for one in self.groups if one.capacity == capacity and not one.alone and not alone]
        group = next((one for one in mine if not one.full), None)
        if group is None:
            group = next((one for one in mine if len(one.owners) < most), None)
            rows = len(group.owners) if group else 0
            rows = rows + 1 if self._tight((most - rows) * capacity) else most
            if group is None:
                group = Group(self._zeros(0, capacity), alone)
                self.groups.append(group)
            self._resize(group, rows)
        group.owners.append(slot)
        self._home[slot] = group, len(group.owners) - 1
        self._room[slot] = capacity
        self.version += 1
        return self.row(slot)

    def _zeros(self, rows: int, capacity: int) -> Tensor:
        """没写到的位置是 0：它们会进注意力再被掩掉，若是随机的内存可能是 NaN，掩掉也还是 NaN。"""
        layers, heads, width = self.shape
        return torch.zeros(layers, rows, 2 * heads, capacity, width, dtype=self.dtype)

    def _resize(self, group: Group, rows: int) -> None:
        """一组改成 ``rows`` 行；只抄住着的，一组至多 ``GROUP_POSITIONS`` 个位置。"""
        store = self._zeros(rows, group.capacity)
        for place, owner in enumerate(group.owners):
            used = self._used[owner]
            store[:, place, :, :used] = group.store[:, place, :, :used]
        self._taken += (rows - group.store.shape[1]) * group.capacity
        group.store = store

    def _vacate(self, group: Group, place: int) -> None:
        """空出一个位置：由同一档里最空的一组的末一行补上，空了的组还掉。"""
        self.version += 1
        peers = [one for one in self.groups if one.capacity == group.capacity and not one.alone]
        donor = group if group.alone else min(peers, key=lambda one: len(one.owners) - (one is group) / 2)
        last = len(donor.owners) - 1
        if (donor, last) != (group, place):
            mover = donor.owners[last]
            used = self._used[mover]
            group.store[:, place, :, :used] = donor.store[:, last, :, :used]
            group.owners[place] = mover
            self._home[mover] = group, place
        donor.owners.pop()
        if not donor.owners:
            self._taken -= donor.store.shape[1] * donor.capacity
            self.groups.remove(donor)
        elif not donor.full and self._tight(0):
            self._resize(donor, len(donor.owners))
