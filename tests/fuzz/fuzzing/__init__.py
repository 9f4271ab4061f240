"""Hostile files on purpose: valid tiny files, structure-aware changes to them, and what every reader must withstand."""
