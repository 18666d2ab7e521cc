"""Emulated networks between parties on one machine: what a link is, the process that is the link, and its check."""
