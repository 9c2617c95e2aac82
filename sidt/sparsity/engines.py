"""What runs a structure faster: torch's block-sparse matrix products on a CPU, its 2:4 kernels on a GPU."""

import copy
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from sidt.errors import InputError
from sidt.sparsity.convolution import pattern_layers
from sidt.sparsity.patterns import Largest, OfEvery
from sidt.sparsity.structures import Structure


class BlockSparseLinear(nn.Module):
    """A linear layer that skips the tiles of its weight that are zero, for inference."""

    def __init__(self, linear: nn.Linear, rows: int, columns: int) -> None:
        """Take over a layer whose weight has zero tiles.

        Args:
            linear: the layer.
            rows: outputs in a tile.
            columns: inputs in a tile.
        """
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features  # sliced attentions read them
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that its sparse layouts are in beta
            self.weight = linear.weight.detach().to_sparse_bsr((rows, columns))
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs @ weight.T + bias``, [..., in] -> [..., out]."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        product = (self.weight @ flat.T).T.reshape(*inputs.shape[:-1], -1)
        return product if self.bias is None else product + self.bias


def check_engine(model: nn.Module, structures: Mapping[str, Structure], engine: str | None) -> None:
    """Check that an engine has something to run, before anything is trained for it.

    Raises:
        InputError: no structure is one for it.
    """
    if engine == "block-sparse":
        block_sparse(model, structures)
    if engine == "patterns":
        pattern_layers(model, structures)
    if engine == "2:4":
        _two_of_four(structures)


def block_sparse(model: nn.Module, structures: Mapping[str, Structure]) -> nn.Module:
    """A copy of a model whose linear layers with tiles skip those that are zero.

    Raises:
        InputError: no structure has tiles that divide a linear layer, or they are not square.
    """
    twin = copy.deepcopy(model).eval()
    count = 0
    for name, structure in structures.items():
        owner = name.rpartition(".")[0]
        layer = twin.get_submodule(owner)
        tiles = next((p.tiles for p in structure.patterns if isinstance(p, Largest)), None)
        if not isinstance(layer, nn.Linear) or tiles is None:
            continue
        rows, columns = tiles.size(layer.weight)
        if layer.out_features % rows or layer.in_features % columns:
            continue
        if rows != columns:
            raise InputError(
                f"{name} has tiles of {tiles}, and torch's block-sparse products take square ones on a CPU; take "
                f"{rows} x {rows}, or leave engine out"
            )
        twin.set_submodule(owner, BlockSparseLinear(layer, rows, columns))
        count += 1
    if not count:
        raise InputError("no linear layer has tiles that divide it, so none can be block-sparse; leave engine out")
    return twin


class OnGpu(nn.Module):
    """A model in half precision on the GPU, from images on the CPU to outputs there: so a call ends when it ends."""

    def __init__(self, model: nn.Module) -> None:
        """Take a copy of a model there."""
        super().__init__()
        self.model = copy.deepcopy(model).eval().half().cuda()

    def forward(self, images: Tensor) -> Tensor:
        """The outputs."""
        outputs: Tensor = self.model(images.half().cuda())
        return outputs.float().cpu()


def semi_structured(model: nn.Module, structures: Mapping[str, Structure]) -> nn.Module:
    """A copy of a model on the GPU whose linear layers with 2:4 use torch's semi-structured kernels.

    Raises:
        InputError: there is no CUDA device, no linear layer is 2:4, or the kernels do not take the size of one.
    """
    if not torch.cuda.is_available():
        raise InputError("2:4 kernels need a CUDA device; leave engine out")
    twin = OnGpu(model)
    for name in _two_of_four(structures):
        layer, weight = twin.model.get_submodule(name.rpartition(".")[0]), twin.model.get_parameter(name)
        try:
            layer.weight = nn.Parameter(to_sparse_semi_structured(weight.detach()), requires_grad=False)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"2:4 kernels do not take {name}: {' '.join(str(error).split())[:200]}") from None
    return twin


def _two_of_four(structures: Mapping[str, Structure]) -> list[str]:
    names = [
        n for n, s in structures.items() if any(isinstance(p, OfEvery) and (p.n, p.m) == (2, 4) for p in s.patterns)
    ]
    if not names:
        raise InputError("no weight is 2:4, so there is nothing for its kernels; give a structure {n: 2, m: 4}")
    return names
