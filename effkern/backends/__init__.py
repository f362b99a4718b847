"""The backends and the choice among them.

Import from the modules below, ``from effkern.backends import choice``: the attribute
``effkern.backends`` is the public function of `choice`, not this package.
"""
