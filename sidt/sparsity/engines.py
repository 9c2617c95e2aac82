"""What runs a structure faster: torch's block-sparse matrix products on a CPU, its 2:4 kernels on a GPU."""

import copy
import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from sidt.errors import InputError
from sidt.sparsity.patterns import Largest
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that its sparse layouts are in beta
            self.weight = linear.weight.detach().to_sparse_bsr((rows, columns))
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """``inputs @ weight.T + bias``, [..., in] -> [..., out]."""
        flat = inputs.reshape(-1, inputs.shape[-1])
        product = (self.weight @ flat.T).T.reshape(*inputs.shape[:-1], -1)
        return product if self.bias is None else product + self.bias


def block_sparse(model: nn.Module, structures: Mapping[str, Structure]) -> nn.Module:
    """A copy of a model whose linear layers with tiles skip those that are zero.

    Raises:
        InputError: no structure has tiles that divide a linear layer.
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
        twin.set_submodule(owner, BlockSparseLinear(layer, rows, columns))
        count += 1
    if not count:
        raise InputError("no linear layer has tiles that divide it, so none can be block-sparse; leave engine out")
    return twin
