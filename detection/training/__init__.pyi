from .distillation import TeacherHook as TeacherHook
from .evaluation import average_precision as average_precision
from .evaluation import score_file as score_file
from .gates import GateHook as GateHook
from .loop import train as train
from .loss import detector_loss as detector_loss
from .loss import read_batches as read_batches
from .structures import StructuresHook as StructuresHook
