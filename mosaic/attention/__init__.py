"""Attention over sharded axes: every method is one program with another schedule.

strategy.py   a method with every number filled in
schedule.py   who hears from whom, in which order
transfer.py   carrying a hop out, and gradients back
heads.py      sequence for heads and back (Ulysses)
program.py    forward and backward
attend.py     this rank's queries against the keys that are here: blocks.py, kernels/, merge.py
plan.py, op.py  the op that stands for all of it in a graph
"""
