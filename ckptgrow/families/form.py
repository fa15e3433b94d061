"""The form of a declaration: what one MLP is made of (Template), where such MLPs sit (Site), what a model has (Family).

A declaration is data: everything in it can be written as JSON and read back (declared.py). Nothing here has seen a
checkpoint; sizes come from tensor shapes when a declaration is held against one (locate.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

MAIN = "main"
Part = Literal["mlp", "expert", "shared"]
# How a config key says a width: the width itself, twice it, its ratio to the hidden size, DINOv2's SwiGLU formula,
# DeciLM's factor.
Rule = Literal["units", "twice", "per hidden", "swiglu", "deci"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of an MLP that has an axis of units: its name below the block, the axis, what its lanes are.

    A lane holds each unit once. `flat`: the axis holds the lanes of all experts, one after the other; `stacked`: the
    first axis is that of experts. In an interleaved tensor each unit takes `span` neighbouring places of the one lane
    ("gate_up"); in a table of scales one place stands for `block` units, and the tensor it scales is `coded`: its
    bytes are no values. `extra` marks the factor of an adapter: any number of them, its other axis a rank; {} in its
    name is that number.
    """

    name: str
    lanes: tuple[str, ...]
    axis: int
    bias: bool = False
    stacked: bool = False
    flat: bool = False
    extra: bool = False
    span: int = 1
    block: int = 1
    coded: bool = False

    @property
    def required(self) -> bool:
        return not self.bias and not self.extra

    @property
    def vector(self) -> bool:
        """Whether a unit is one number in it: a bias, or the weight of a norm over the units."""
        return self.bias or self.lanes[0] == "norm"

    @property
    def places(self) -> Fraction:
        """How many places of a lane a unit takes."""
        return Fraction(self.span, self.block)

    @property
    def shared(self) -> bool:
        """Whether it is the tensor of shares: down, or the scales of a coded down."""
        return self.lanes[0] == "down" and not self.coded


@dataclass(frozen=True, slots=True)
class Template:
    """What one MLP is made of. `still` names the tensors beside it that have no axis of units."""

    slots: tuple[Slot, ...]
    still: tuple[str, ...]
    gated: bool

    @property
    def normed(self) -> bool:
        """Whether a norm takes its statistics over the units."""
        return any(slot.lanes == ("norm",) for slot in self.slots)


def linear(*, turned: bool = False, norm: str = "", beside: tuple[str, ...] = (), **projections: str) -> Template:
    """The template of Linear layers in [out, in] layout, each with or without bias: `linear(up="fc1", down="fc2")`.

    A key with an underscore is a fused projection whose halves come in that order: `gate_up="gate_up_proj"`. `turned`
    is the [in, out] layout of Conv1D; `norm` a norm over the hidden units, with or without bias; `beside` names tensors
    in the block that have no axis of units.
    """
    slots: list[Slot] = []
    for role, module in projections.items():
        lanes = tuple(role.split("_"))
        slots.append(Slot(f"{module}.weight", lanes, axis=int((role == "down") != turned)))
        if role != "down":
            slots.append(Slot(f"{module}.bias", lanes, axis=0, bias=True))
    if norm:
        slots += [Slot(f"{norm}.weight", ("norm",), 0), Slot(f"{norm}.bias", ("norm",), 0, bias=True)]
    return _template(slots, f"{projections['down']}.bias", *beside)


def stack(
    *, turned: bool = False, interleaved: bool = False, ending: str = "", biases: bool = False, **projections: str
) -> Template:
    """The template of experts in 3-D tensors: gate_up [E, 2F, H] and down [E, H, F]; `turned` [E, H, 2F], [E, F, H].

    The tensors are called as the projections are, with `ending` behind; `interleaved`: gate and up alternate along
    the axis. With `biases`, gate_up_bias [E, 2F] grows too and down_bias stays.
    """
    slots: list[Slot] = []
    for role, name in projections.items():
        woven = interleaved and role != "down"
        lanes, span = ((role,), 2) if woven else (tuple(role.split("_")), 1)
        axis = 1 + int((role == "down") != turned)
        slots.append(Slot(name + ending, lanes, axis, stacked=True, span=span))
        if biases and role != "down":
            slots.append(Slot(f"{name}_bias", lanes, 1, bias=True, stacked=True, span=span))
    return _template(slots, *([f"{projections['down']}_bias"] if biases else []))


def flat(**projections: str) -> Template:
    """The template of experts in 2-D tensors, all of them [E x F, H], down too."""
    return _template([Slot(name, (role,), 0, flat=True) for role, name in projections.items()])


def adapted(template: Template, name: str) -> Template:
    """The template with adapters of its first projection: the factor called `name`, [units, rank], and its sibling."""
    first = template.slots[0]
    return Template((*template.slots, Slot(name, first.lanes, 0, extra=True)), template.still, template.gated)


def _template(slots: list[Slot], *still: str) -> Template:
    gated = any("gate" in lane for slot in slots for lane in slot.lanes)
    return Template(tuple(slots), still, gated)


@dataclass(frozen=True, slots=True)
class Site:
    """Where MLPs of one kind sit in a model, and which config keys describe them. Keys are dotted, below `scope`.

    In `stem`, {layer} and {expert} are their numbers, {} any number, *. any stretch of the name. The config key
    `width` says the width by `rule`; sites with one key grow together. Where `multiple`, a width is a whole multiple
    of what the key says (shared experts: one for each); where `listed`, the key may be a list, a number for each layer;
    with `entry`, it is a list of objects, one for each layer, and that dotted key in each says the width.
    `also` holds keys that a grown config must set besides. `open` where other things of the layer lie in the block too.
    `spare`: there may be experts without down, which answer nothing, but whose tensors a loader stacks with the rest.
    `bent`: a unit is not linear in its row of up though it has a gate, since the model clamps or shifts what up says.
    """

    template: Template
    stem: str = "layers.{layer}.mlp"
    width: str = "intermediate_size"
    part: Part = "mlp"
    tower: str = MAIN
    scope: str = ""
    depth: str = "num_hidden_layers"
    hidden: str = "hidden_size"
    activation: str = "hidden_act"
    default_activation: str = "silu"  # where the config does not say
    rule: Rule = "units"
    multiple: bool = False
    listed: bool = False
    entry: str = ""
    open: bool = False
    spare: bool = False
    bent: bool = False
    experts: str = ""  # the key with their number, where shapes do not say it
    also: tuple[tuple[str, bool | int | str], ...] = ()

    @property
    def path(self) -> str:
        """The dotted config key of the width."""
        return self.under(self.width)

    def under(self, key: str) -> str:
        """A key of this site as a dotted path from the top of config.json."""
        return ".".join(filter(None, (self.scope, key)))


@dataclass(frozen=True, slots=True)
class Family:
    """One model_type: its sites, and the traps that come with it."""

    model_type: str
    sites: tuple[Site, ...]
    norm_after: bool = False  # a norm follows the MLP: outputs cannot see the scale of down (METHOD.md 8)
    statistics: bool = False  # it takes statistics over the width, so every unit must come equally often
    sparse: bool = False  # not every layer has an MLP
    extra_layers: bool = False  # layers behind num_hidden_layers, or under mtp., predict further tokens
    embedding: str = "embed_tokens.weight"
    in_memory: tuple[tuple[str, str], ...] = ()  # prefix on disk -> prefix in a transformers model
    refuses: tuple[tuple[str, str], ...] = ()  # a tower that cannot grow, and why
    recast: str = ""  # the model_type of the same layers whose config says a width for each (recast.py)
    windowed: bool = False  # attention has a sliding window where the config does not say otherwise

    @property
    def towers(self) -> tuple[str, ...]:
        """The towers in the order of their sites; the first is grown where none is asked for."""
        return tuple(dict.fromkeys(site.tower for site in self.sites))
