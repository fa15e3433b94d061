"""Many tensor names in few patterns that match exactly them: products of what may stand between the dots.

    model.layers.0.mlp.gate_proj.weight ... model.layers.9.mlp.up_proj.weight
    -> model . layers . {0 ... 9} . mlp . {gate_proj, up_proj} . weight

A place of numbers becomes "any number" only where no other tensor of the checkpoint would match then.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator

Product = tuple[frozenset[str], ...]
ANY = frozenset({"[0-9]+"})  # stands in a product for every number


def patterns(names: Collection[str], others: Collection[str], dot: str = r"\.") -> tuple[str, ...]:
    """Regular expressions that together match all of `names` and none of `others`, without anchors.

    `dot` is how the language writes a literal dot.
    """
    return tuple(_written(_widened(product, others), dot) for product in products(names))


def products(names: Collection[str]) -> tuple[Product, ...]:
    """The names as few products: in each, every choice of one part a place is a name, and no name is lost."""
    found: list[Product] = [tuple(frozenset({part}) for part in name.split(".")) for name in names]
    for place in range(max(map(len, found), default=0)):
        joined: dict[tuple[Product, Product], frozenset[str]] = defaultdict(frozenset)
        for product in found:
            if len(product) > place:
                joined[product[:place], product[place + 1 :]] |= product[place]
        short = [product for product in found if len(product) <= place]
        found = short + [(*before, parts, *after) for (before, after), parts in joined.items()]
    return tuple(found)


def _widened(product: Product, others: Collection[str]) -> Product:
    """The product with "any number" wherever that lets in none of the others."""
    for place, parts in enumerate(product):
        if all(part.isdecimal() for part in parts):
            wider = (*product[:place], ANY, *product[place + 1 :])
            pattern = re.compile(_written(wider, r"\."))
            if len(parts) > 1 and not any(pattern.fullmatch(other) for other in others):
                product = wider
    return product


def _written(product: Product, dot: str) -> str:
    return dot.join(_choice(parts) for parts in product)


def _choice(parts: frozenset[str]) -> str:
    if parts == ANY:
        return next(iter(ANY))
    choices = [re.escape(part) for part in sorted(parts, key=_in_order)]
    return choices[0] if len(choices) == 1 else f"({'|'.join(choices)})"


def _in_order(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdecimal() else (-1, part)


def spelled(spans: Collection[tuple[int, int]]) -> Iterator[str]:
    """Half-open ranges as Python and Axolotl write them."""
    for start, stop in spans:
        yield f"[{start}:{stop}]"
