"""Printing for users: text and tables, progress bars, and each report."""
