"""Masking functions with the names, arguments and returns of those of other libraries, one module for each.

`sslkernels.compat.mae`, `sslkernels.compat.lightly` and `sslkernels.compat.dinov2`. Changing the import is the whole
migration; docs/migration-masking.md says what differs. Each takes a ``seed`` and ``sample_ids`` besides, of which its
masks are then a function.
"""
