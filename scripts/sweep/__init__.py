"""Sweeps of scripts/reproduce.py: what an experiment is, running it, judging it, and its report."""
