"""Fused operators for continuous-time consistency training of linear-attention transformers, plain and dual.

Each is a module and a function of one name, `from tbcm_kernels.norm_modulate import norm_modulate`, that runs a Triton
kernel on CUDA tensors and plain PyTorch on all others (see `dispatch`), with gradients. Network operators take and
return dual numbers (`catalog.Dual`): a value with its autograd graph and a tangent without one, or None where none is
wanted. `registry` has all of them by name, with what they cost.
"""
