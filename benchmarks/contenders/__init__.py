"""Contenders: everything that a user would pick, behind the same few verbs.

Each is given what its own users give it, and has synced what it wrote when its verb returns; where a peer does not do
so itself, the time that syncing takes is its own.
"""
