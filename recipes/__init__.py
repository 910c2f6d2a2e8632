"""Example models and data in plain Lightning, and the YAML files that attach objectives to them.

The Python files import nothing of `lightning_aux`: they stand for code that somebody already has.
"""
