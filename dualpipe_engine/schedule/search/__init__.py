"""The choice: the best variant of one schedule, and the best of all schedules."""
