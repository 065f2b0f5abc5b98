"""The kernels, one file a job. Parameters in capitals are fixed at compile time, the others given at launch.

Untyped on purpose: Triton's compiler reads annotations as code.
"""
