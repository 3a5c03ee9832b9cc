"""Torture: a small job that is killed again and again on a user's own storage, and what it finds when it comes back.

Invariant: only `job` imports torch, and it runs in processes of its own.
"""
