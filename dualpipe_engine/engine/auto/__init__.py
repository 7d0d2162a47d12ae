"""`"schedule": "auto"`: measurements on the job's own ranks, and the choice that they lead to."""
