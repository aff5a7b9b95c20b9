# SPDX-License-Identifier: Apache-2.0
"""The error of a model or picture that a command line names and that cannot be used."""


class SourceError(ValueError):
    """A model or a picture cannot be used; the message starts with the option that names it."""
