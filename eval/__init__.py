"""Evaluation: `python -m eval.run` scores a model on a suite and writes a report."""
