"""An Ascend rank's graph rewritten for CPU."""
