"""One exported forward of a model, walked through: which axes of its tensors are the same."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind

from sidt.drafting.atoms import Atoms, Expr
from sidt.errors import InputError
from sidt.space.trace import InputSize, meta_copy


@dataclass(frozen=True)
class Seen:
    """A tensor: its axes, and whether it is a parameter that was only looked at in another shape."""

    axes: tuple[Expr, ...]
    pure: bool = False


@dataclass(frozen=True)
class Product:
    """A product of two tensors that are no parameters: the axes it batches over, contracts and leaves."""

    owner: str
    batch: tuple[Expr, ...]
    contracted: Expr
    left: tuple[Expr, ...]


@dataclass
class Forward:
    """What one forward showed.

    Attributes:
        atoms: all atoms.
        tensors: the axes of every parameter and buffer, by name.
        outputs: the axes of what comes out.
        products: the products of attentions, in order.
        statistics: axes over which a norm takes statistics, and where.
        sums: axes over which a sum or a vector's norm is taken, and where.
        unknown: the operations that no rule is for, and where the first is.
    """

    atoms: Atoms = field(default_factory=Atoms)
    tensors: dict[str, tuple[Expr, ...]] = field(default_factory=dict)
    outputs: list[Expr] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    statistics: list[tuple[Expr, str]] = field(default_factory=list)
    sums: list[tuple[Expr, str]] = field(default_factory=list)
    unknown: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """One operation: its arguments by name, the shapes of what it gives, and the module that it stands in."""

    name: str
    given: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    owner: str
    forward: Forward

    @property
    def atoms(self) -> Atoms:
        """All atoms."""
        return self.forward.atoms

    @property
    def where(self) -> str:
        """What is said of it."""
        return f"{self.name} in {self.owner or 'the model'}"

    def seen(self) -> Iterator[Seen]:
        """Its arguments that are tensors."""
        for value in self.given.values():
            yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, Seen))


def exported(model: nn.Module, size: InputSize) -> torch.export.ExportedProgram:
    """One forward of a model on the meta device.

    Raises:
        InputError: it cannot be exported.
    """
    image = torch.empty(1, *size, device="meta", dtype=next(model.parameters()).dtype)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a forward keeps for the next one: this one has no next
            return torch.export.export(meta_copy(model), (image,), strict=False)
    except Exception as error:  # torch.export has errors of many kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{type(model).__name__} cannot be exported by torch, so no draft is made: {reason}") from None


def first_names(model: nn.Module) -> dict[str, str]:
    """For every name of a tensor, the first that it has: a module may stand in several places."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in tensors}


def walk(program: torch.export.ExportedProgram, apply: Callable[[Call], Any], first: Mapping[str, str]) -> Forward:
    """The axes of all tensors of one forward.

    Args:
        program: the exported model.
        apply: what comes out of an operation.
        first: for every name of a tensor the one that it goes by.
    """
    forward = Forward()
    atoms = forward.atoms
    known: dict[torch.fx.Node, Any] = {}
    inputs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            shape, spec = _shapes(node)[0], inputs[node.name]
            own = spec.kind in (InputKind.PARAMETER, InputKind.BUFFER)
            axes = tuple(
                atoms.fresh(n) if own else atoms.fresh(n, "it is a constant", spec.kind is InputKind.USER_INPUT)
                for n in shape
            )
            if own and spec.target is not None:
                axes = forward.tensors.setdefault(first.get(spec.target, spec.target), axes)
            known[node] = Seen(axes, own)
        elif node.op == "call_function":
            known[node] = apply(_call(node, known, forward))
        elif node.op == "output":
            results = torch.utils._pytree.tree_leaves(node.args)
            forward.outputs = [a for n in results if isinstance(known.get(n), Seen) for a in known[n].axes]
        else:  # a graph inside the graph, of control flow
            known[node] = None
    return forward


def _shapes(node: torch.fx.Node) -> tuple[tuple[int, ...], ...]:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(tuple(map(int, v.shape)) for v in values if isinstance(v, Tensor))


def _call(node: Any, known: Mapping[Any, Any], forward: Forward) -> Call:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    owner = stack[-1][0] if stack else ""
    args = torch.fx.node.map_arg(node.args, lambda n: known.get(n))
    kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: known.get(n))
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else [str(i) for i in range(len(args))]
    given = {a.name: a.default_value for a in schema.arguments if a.has_default_value()} if schema is not None else {}
    given |= dict(zip(names, args, strict=False)) | kwargs
    name = node.target.__name__.split(".")[0] if schema is not None else getattr(node.target, "__name__", "?")
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return Call(("pointwise:" if pointwise else "") + name, given, _shapes(node), owner, forward)
