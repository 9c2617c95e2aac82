from .loading import Splits as Splits
from .loading import load_data as load_data
from .preparation import DataConfig as DataConfig
from .preparation import prepared_for as prepared_for
