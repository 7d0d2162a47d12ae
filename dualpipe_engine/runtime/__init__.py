"""Runs one rank's program of a plan on real stages."""
