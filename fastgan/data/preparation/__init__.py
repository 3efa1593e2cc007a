"""`fastgan prepare`: what SRC may be, how a prepared set is made from it on all cores, and how a set is verified.

Nothing here imports torch: the worker processes do not need it, and importing it takes seconds.
"""
