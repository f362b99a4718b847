"""What ``effkern bench``, ``effkern demo`` and the scripts of ``benchmarks/`` share.

Importing this package imports nothing else; each part is imported where it is used.
"""
