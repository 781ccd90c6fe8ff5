"""Callbacks that put a Tracker into other packages' training loops; each needs the package that it is named after."""
