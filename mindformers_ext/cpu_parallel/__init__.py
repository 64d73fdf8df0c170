"""Run the sharded graphs of a cluster's ranks as CPU processes of one machine."""
