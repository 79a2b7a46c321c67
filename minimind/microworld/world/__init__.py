"""云川：一条河、十六座小镇和住在那里的人。这里是全部真相。"""

from __future__ import annotations

from .animals import ANIMALS
from .base import Fact, Kind, Relation
from .festivals import FESTIVALS
from .people import PEOPLE
from .places import PLACES
from .products import PRODUCTS

KINDS: tuple[Kind, ...] = (PLACES, PEOPLE, ANIMALS, PRODUCTS, FESTIVALS)

TOWNS = PLACES.subjects
NAMES = PEOPLE.subjects

__all__ = [
    "ANIMALS",
    "FESTIVALS",
    "KINDS",
    "NAMES",
    "PEOPLE",
    "PLACES",
    "PRODUCTS",
    "TOWNS",
    "Fact",
    "Kind",
    "Relation",
]
