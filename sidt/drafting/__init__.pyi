from .draft import Draft as Draft
from .draft import drafts as drafts
