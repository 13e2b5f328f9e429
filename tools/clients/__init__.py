"""The trainers that ``python -m tools.check_clients`` runs against star_kernels.integrations.

A client is a module with a function ``check(folder) -> Iterator[Finding]``, listed in ``tools.check_clients.CLIENTS``.
Signatures that the integrations rely on are data, in ``interface_*.py``: the tests of the project hold their stand-ins
to the same data.
"""
