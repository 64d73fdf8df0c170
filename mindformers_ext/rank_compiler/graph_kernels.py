"""Passes of MindSpore's graph kernels that let a product add to a buffer (`context.graph_kernel_flags`, docs/graph.md).

Of MindSpore 2.9.0, plugin/ascend/graph_optimizer/pass/ir_fusion/; imports nothing, for the instant check.
"""

JOINED = {"GroupedMatmul": "grouped_matmul_assignadd_fusion", "MatMul": "matmul_assignadd_fusion"}
JOINED_ELEMENTS = 10_000_000  # of the largest result of a matrix product that is joined
