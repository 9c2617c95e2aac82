from . import pipeline as pipeline
from .config import RunConfig as RunConfig
from .config import read_config as read_config
from .folder import Run as Run
from .folder import open_run as open_run
