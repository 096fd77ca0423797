"""The experiments of the SIRE paper and those that its readers asked for: `sire-fast reproduce NAME`.

data.py         images and point clouds, from a path or generated
problems.py     what is learned: batches, loss, allowed orders, measures
trials.py       one model trained once, and a pool of processes for many
experiments.py  which trials make a figure or a table; published numbers
report.py       tables, pictures and JSON from the trials' files
"""
