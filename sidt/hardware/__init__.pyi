from .crossbars import CrossbarDevice as CrossbarDevice
from .crossbars import count_crossbars as count_crossbars
from .device import read_device as read_device
from .fpga import FpgaDevice as FpgaDevice
from .fpga import count_cycles as count_cycles
