"""Search-space files drafted from one exported forward of a model.

``__init__.pyi`` names what is public here; it is loaded on first use.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
