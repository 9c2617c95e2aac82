"""Models of hardware: cycles against a closed form and a loop written out, crossbars against hand counts."""

import copy
from math import ceil
from pathlib import Path

import pytest
import torch
from backbones import PVT, VIT_TINY, dense
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sidt.hardware import CrossbarDevice, FpgaDevice, count_crossbars, count_cycles, read_device
from sidt.hardware.crossbars import crossbars
from sidt.hardware.device import connections
from sidt.hardware.fpga import kept_tiles, tile_cycles
from sidt.space.trace import trace

CONFIGS = Path(__file__).parents[2] / "configs" / "sparsity"
SMALL = {"tile_outputs": 4, "tile_inputs": 2, "tile_positions": 10, "clock": 1e6, "bits": 16}
FPGA = FpgaDevice(**SMALL, weight_ports=2, input_ports=1, output_ports=8)
CROSSBAR = CrossbarDevice(rows=4, columns=6, cell_bits=4, weight_bits=8, signed="offset")  # 4 inputs x 3 outputs


def test_a_dense_layer_by_hand():
    """8 outputs in 2 rows of tiles, 5 inputs in 3 tiles, 25 positions as 3 times 9."""
    layer = nn.Linear(5, 8)
    (row,) = count_cycles(nn.Sequential(layer), {"0.weight": ((0, 8, 25),)}, FPGA)
    load = max(4 * 2 / 2, 2 * 9 / 1)  # more than the 9 cycles that computing takes
    a_row = 3 * load + 9
    assert a_row > 4 * 9 / 8
    assert row.cycles == row.dense_cycles == 3 * 2 * a_row + ceil(4 * 9 / 8)
    assert row.tiles == row.dense_tiles == 6
    assert row.milliseconds == pytest.approx(row.cycles / 1e6 * 1e3)
    words = 3 * (6 * (4 * 2 + 2 * 9) + 2 * 4 * 9)
    assert row.megabytes == pytest.approx(words * 16 / 8 / 1e6)


@given(
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 20),
    kernel=st.sampled_from((1, 9)),
    positions=st.integers(1, 70),
    ports=st.tuples(*[st.integers(1, 16)] * 3),
)
def test_a_dense_layer_is_the_closed_form(outputs, inputs, kernel, positions, ports):
    device = FpgaDevice(**SMALL, weight_ports=ports[0], input_ports=ports[1], output_ports=ports[2])
    kept = kept_tiles(torch.ones(outputs, inputs, dtype=torch.bool), device)
    rounds = ceil(positions / 10)
    t = ceil(positions / rounds)
    step = max(kernel * t, ceil(8 * kernel / ports[0]), ceil(2 * t / ports[1]))
    store = ceil(4 * t / ports[2])
    expected = rounds * ceil(outputs / 4) * max(ceil(inputs / 2) * step + kernel * t, store) + store
    assert tile_cycles(kept, kernel, positions, device)[0] == expected


def by_loop(weight, positions, device):
    """The same by walking over every tile, with its entries looked at one by one."""
    kernel = weight[0, 0].numel()
    rounds = ceil(positions / device.tile_positions)
    t = ceil(positions / rounds)
    cycles = loads = store = 0
    for _ in range(rounds):
        for o in range(0, weight.shape[0], device.tile_outputs):
            busy = any_tile = 0
            for i in range(0, weight.shape[1], device.tile_inputs):
                tile = weight[o : o + device.tile_outputs, i : i + device.tile_inputs]
                if any(value != 0 for value in tile.flatten().tolist()):
                    weights = ceil(device.tile_outputs * device.tile_inputs * kernel / device.weight_ports)
                    busy += max(kernel * t, weights, ceil(device.tile_inputs * t / device.input_ports))
                    any_tile, loads = kernel * t, loads + 1
            store = ceil(device.tile_outputs * t / device.output_ports)
            cycles += max(busy + any_tile, store)
    return cycles + store, loads // rounds


@given(
    shape=st.tuples(st.integers(1, 14), st.integers(1, 9), st.sampled_from((1, 3))),
    density=st.sampled_from((0.0, 0.03, 0.2)),
    positions=st.integers(1, 35),
    seed=st.integers(0, 99),
)
def test_skipped_tiles_are_those_of_a_loop(shape, density, positions, seed):
    torch.manual_seed(seed)
    outputs, inputs, size = shape
    conv = nn.Conv2d(inputs, outputs, size)
    with torch.no_grad():
        conv.weight *= torch.rand(conv.weight.shape) < density
    (row,) = count_cycles(nn.Sequential(conv), {"0.weight": ((0, outputs, positions),)}, FPGA)
    assert (row.cycles, row.tiles) == by_loop(conv.weight, positions, FPGA)
    assert row.cycles <= row.dense_cycles == by_loop(torch.ones_like(conv.weight), positions, FPGA)[0]


def test_rows_used_at_other_positions_are_layers_of_their_own():
    weight = nn.Sequential(nn.Linear(6, 12))
    parts = [count_cycles(weight, {"0.weight": (part,)}, FPGA)[0] for part in ((0, 5, 30), (5, 12, 8))]
    (both,) = count_cycles(weight, {"0.weight": ((0, 5, 30), (5, 12, 8))}, FPGA)
    assert both.cycles == sum(part.cycles for part in parts)
    assert both.tiles == sum(part.tiles for part in parts)


def test_a_stride_loads_more_inputs():
    plain, strided = nn.Conv2d(2, 4, 4), nn.Conv2d(2, 4, 4, stride=4)
    rows = {"0.weight": ((0, 4, 10),)}
    first, second = (count_cycles(nn.Sequential(conv), rows, FPGA)[0] for conv in (plain, strided))
    assert first.cycles == 160 + 160 + 5  # compute of 16 entries at 10 positions; 20 cycles of inputs are hidden
    assert second.cycles == 2 * 10 * 16 + 160 + 5  # 16 new input positions for each output


def test_a_depthwise_convolution_is_the_diagonal():
    conv = nn.Conv2d(16, 16, 3, groups=16)
    (row,) = count_cycles(nn.Sequential(conv), {"0.weight": ((0, 16, 10),)}, FPGA)
    assert row.dense_tiles == row.tiles == 8  # each 4 outputs read 4 inputs: 2 tiles of 2
    assert connections(conv.weight, 16).any(2).equal(torch.eye(16, dtype=torch.bool))


def test_a_transposed_convolution_is_read_from_its_inputs():
    conv = nn.Sequential(nn.ConvTranspose2d(6, 4, 2, stride=2))
    seen = trace(conv, (6, 5, 5)).positions
    (row,) = count_cycles(conv, seen, FPGA)
    assert seen == {"0.weight": ((0, 6, 25),)} and row.tiles == 1 * 3
    with torch.no_grad():
        conv[0].weight[:2] = 0
    assert count_cycles(conv, seen, FPGA)[0].tiles == 2


@pytest.mark.parametrize("backbone", [VIT_TINY, PVT], ids=str)
def test_a_model_with_every_second_tile_of_zeros(backbone):
    model, space = dense(backbone)
    device = read_device(FpgaDevice, CONFIGS / "fpga.yaml")
    table = count_cycles(model, space.trace.positions, device)
    assert [row.name for row in table] == list(space.trace.positions)
    assert all(row.cycles == row.dense_cycles and row.tiles == row.dense_tiles for row in table)
    # No engine does more than Tm x Tn multiply-adds a cycle; those of attention are not counted.
    weights = sum(model.get_parameter(n)[f:t].numel() * c for n, r in space.trace.positions.items() for f, t, c in r)
    assert weights <= sum(row.cycles for row in table) * device.tile_outputs * device.tile_inputs
    pruned = copy.deepcopy(model)
    linear = {f"{n}.weight": m.weight for n, m in pruned.named_modules() if isinstance(m, nn.Linear)}
    with torch.no_grad():
        for weight in linear.values():
            weight.view(len(weight), -1, min(8, weight.shape[1]))[:, ::2] = 0
    for row in count_cycles(pruned, space.trace.positions, device):
        if row.name in linear and row.dense_tiles > 2 * ceil(len(linear[row.name]) / 16):
            assert row.tiles == row.dense_tiles // 2 and 0.5 <= row.cycles / row.dense_cycles < 0.7


# --- crossbars -----------------------------------------------------------------------------------------------------


def matrix(text):
    """Rows of 0 and 1: outputs x inputs."""
    return torch.tensor([[int(c) for c in line] for line in text.split()], dtype=torch.bool)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1111 " * 3, 1),
        ("11111 " * 3, 2),
        ("1111 " * 4, 2),
        ("11111 " * 4, 4),
        ("10110 " * 3, 1),  # zero inputs have no row
        ("11111 00000 11111 00000 11111", 2),  # zero outputs have no column
        ("00000 00000", 0),
        # Both blocks of 3 outputs read 4 of 8 inputs: one crossbar each, not two.
        ("11110000 " * 3 + "00001111 " * 3, 2),
        ("10101010 " * 3 + "01010101 " * 3, 2),
        # The first 4 inputs reach 3 of 6 outputs, every second one: 2 crossbars by inputs, 4 by outputs.
        ("11110000 00001111 " * 3, 2),
    ],
)
def test_crossbars_by_hand(text, count):
    assert crossbars(matrix(text), CROSSBAR) == count
    pair = CROSSBAR.model_copy(update={"signed": "pair"})
    assert crossbars(matrix(text), pair) == 2 * count


@given(outputs=st.integers(1, 30), inputs=st.integers(1, 30), seed=st.integers(0, 99), density=st.floats(0, 1))
def test_zeros_never_cost_crossbars_and_dense_is_the_closed_form(outputs, inputs, seed, density):
    generator = torch.Generator().manual_seed(seed)
    connected = torch.rand(outputs, inputs, generator=generator) < density
    whole = crossbars(torch.ones_like(connected), CROSSBAR)
    assert whole == ceil(outputs / 3) * ceil(inputs / 4)
    assert ceil(int(connected.sum()) / 12) <= crossbars(connected, CROSSBAR) <= whole


def test_crossbars_of_a_model():
    model = nn.Sequential(nn.Conv2d(3, 6, 2), nn.Conv2d(6, 6, 2, groups=6), nn.Flatten(), nn.Linear(6, 7))
    with torch.no_grad():
        model[3].weight[:, :3] = 0
    table = count_crossbars(model, trace(model, (3, 3, 3)).positions, CROSSBAR)
    assert [row.name for row in table] == ["0.weight", "1.weight", "3.weight"]
    assert [(row.crossbars, row.dense_crossbars) for row in table] == [
        (2 * 3, 2 * 3),  # 12 inputs
        (6, 6),  # 3 outputs with 4 inputs each, twice
        (3, 6),
    ]


def test_example_crossbars_hold_8_bits_in_two_cells():
    device = read_device(CrossbarDevice, CONFIGS / "crossbar.yaml")
    assert device.outputs == 64
    assert crossbars(torch.ones(768, 192, dtype=torch.bool), device) == 2 * 12 * 2


# --- what cannot be used -------------------------------------------------------------------------------------------

CROSSBAR_TEXT = "rows: 4\ncolumns: 6\ncell_bits: 4\nweight_bits: 8\nsigned: pair\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rows: [", ("not YAML",)),
        ("- 4", ("must be a mapping", "rows", "[4]")),
        (CROSSBAR_TEXT + "pitch: 3", ("pitch", "unknown", "rows, columns")),
        (CROSSBAR_TEXT.replace("rows: 4\n", ""), ("rows", "missing", "known here: rows")),
        (CROSSBAR_TEXT.replace("rows: 4", "rows: 0"), ("rows", "greater than or equal to 1", "got 0")),
        (CROSSBAR_TEXT.replace("rows: 4", "rows: many"), ("rows", "integer", "many")),
        (CROSSBAR_TEXT.replace("pair", "both"), ("signed", "'pair' or 'offset'", "both")),
        (CROSSBAR_TEXT.replace("columns: 6", "columns: 1"), ("8 bits", "2 cells", "columns is 1")),
    ],
)
def test_a_bad_device_is_one_line(text, words, tmp_path, refused):
    path = tmp_path / "device.yaml"
    path.write_text(text)
    with refused(path, *words):
        read_device(CrossbarDevice, path)


def test_a_device_that_is_not_there(tmp_path, refused):
    with refused(tmp_path / "none.yaml", "No such file"):
        read_device(FpgaDevice, tmp_path / "none.yaml")


def test_positions_of_another_model(refused):
    with refused("1.weight", "trace it"):
        count_cycles(nn.Sequential(nn.Linear(4, 4)), {"1.weight": ((0, 4, 1),)}, FPGA)
    with refused("0.weight", "4 rows"):
        count_crossbars(nn.Sequential(nn.Linear(4, 4)), {"0.weight": ((0, 8, 1),)}, CROSSBAR)
    grouped = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2))
    with refused("0.weight", "2 groups"):
        count_cycles(grouped, {"0.weight": ((0, 4, 1),)}, FPGA)
