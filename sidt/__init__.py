"""SiDT: make vision transformers smaller by searching their dimensions.

``__init__.pyi`` names what is public here; it is loaded on first use, so that ``import sidt`` does not import torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
