from .checkpoint import load as load
from .checkpoint import save as save
from .constructor import to_timm as to_timm
from .models import create_model as create_model
from .onnx import to_onnx as to_onnx
from .program import to_torch as to_torch
from .weights import load_weights as load_weights
from .weights import read_weights as read_weights
