"""`fastgan prepare`: what SRC may be, how a set is made of it over all cores, and whether it is whole still.

Nothing here imports torch: the processes that prepare images have no use for it.
"""
