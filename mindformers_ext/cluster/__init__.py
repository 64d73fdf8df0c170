"""From one command to the processes of every machine of a job."""
