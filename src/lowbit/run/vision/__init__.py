"""Runtimes with eyes and ears: a text model together with its projector."""
