"""Callbacks that put a Tracker into other people's training loops; each needs the package that it is named after."""
