from .alignment import align as align
from .compensation import compensate as compensate
from .compensation import refit_width as refit_width
from .heads import with_classes as with_classes
from .moments import Moments as Moments
from .moments import measure_moments as measure_moments
from .slicing import mask_model as mask_model
from .slicing import slice_model as slice_model
