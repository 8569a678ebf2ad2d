"""Layouts of other programs, import and export: tensors by name, diffusers folders, StableHLO."""
