"""Attention over sharded axes: every method is one program with another schedule.

way.py        a method with every number filled in
schedule.py   who hears from whom, in which order
hops.py       carrying a hop out, and gradients back
heads.py      sequence for heads and back (Ulysses)
program.py    forward and backward
attend.py     this rank's queries against the keys that are here: blocks.py, kernels.py, merge.py
plan.py, op.py  the op that stands for all of it in a graph
"""
