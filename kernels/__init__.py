"""Home of the Triton kernels, installed as sire_fast.kernels. There are none yet: on a GPU sire_fast's layers run
torch's own layer on the stacked variants."""
