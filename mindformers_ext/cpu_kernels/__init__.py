"""Fused operators for MindSpore's CPU: C++ kernels with hand-written gradients, used as AOT Custom operators."""
