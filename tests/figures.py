"""Figures and held-out diagnostics of finished runs that a method's reader may skip. Loaded by the scripts through common.load_tool."""
