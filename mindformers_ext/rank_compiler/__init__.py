"""Any rank's graph, compiled by MindSpore for Ascend on any machine."""
