"""Commands for developers, run as modules: python -m tools.NAME"""
