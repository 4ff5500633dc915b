"""Runs and races: from a config to a folder of results."""
