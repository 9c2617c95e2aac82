from .checkpoint import load as load
from .checkpoint import save as save
from .constructor import to_timm as to_timm
from .models import create_model as create_model
from .weights import load_weights as load_weights
from .weights import read_weights as read_weights
