"""Callbacks that drive an attribute of the user's modules by a schedule."""
