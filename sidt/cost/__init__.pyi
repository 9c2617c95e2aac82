from .budget import Budget as Budget
from .complexity import ComplexityReport as ComplexityReport
from .complexity import measure as measure
from .complexity import report as report
from .complexity import time_forward as time_forward
from .latency import LayerLatencies as LayerLatencies
from .latency import load_latencies as load_latencies
