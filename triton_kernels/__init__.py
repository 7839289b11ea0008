"""Predictive coding in Triton: the kernels of the triton backend, one idea a file. Installed as pckernels.triton.

Importing this package needs no Triton; importing the modules with kernels does.
"""
