"""The gateway: loads artifacts, answers for them over HTTP, and says at any time what it is doing.

A request's way: edge (trace, keys, rates, log) -> routes -> router (which model) -> limits (slots) -> engines.
"""
