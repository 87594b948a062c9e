"""Layers: mixers and norms, which take explicit keywords and never a config."""
