"""Whole training runs, each a module to run."""
