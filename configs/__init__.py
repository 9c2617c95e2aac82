"""Configs that ship with SiDT; each opens with its command."""
