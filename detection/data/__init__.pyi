from .annotations import check_annotations as check_annotations
from .annotations import read_annotations as read_annotations
from .digits import write_digits as write_digits
from .sources import Source as Source
from .sources import source_of as source_of
