from . import pipeline as pipeline
from .folder import DetectionRun as DetectionRun
from .folder import open_run as open_run
from .settings import Settings as Settings
