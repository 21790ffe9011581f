"""What people see: text and tables, progress bars, and each report."""
