"""Forwards of sliced modules, one module for each library's family whose file in ``search_spaces/`` names it.

Each has ``FORWARDS`` and, if sublayers can be left without units, ``EMPTY``, as :mod:`sidt.surgery.attention` does.
"""
