"""Callbacks that measure and log, and change nothing."""
