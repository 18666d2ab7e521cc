"""AERO: language models that answer a prompt their operator cannot see."""

__version__ = "0.1.0"
