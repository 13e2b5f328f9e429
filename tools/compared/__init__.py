"""The packages that tools/compare_maps.py measures: each is attached to a model through its own public entry point.

A module has ``MODELS``, the models of :mod:`tools.compared.models` that the package supports, and
``attach(checkout, name, model, gradients)``, a context in which passes of the model make maps; it yields a function
that returns the maps of the last pass. ``gradients`` asks for maps that are differentiable, where there is an option.
"""
